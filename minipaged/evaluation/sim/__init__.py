"""Serving without a model: the real scheduler and the real memories under a virtual clock.

Whatever the paper says of memory and of queues needs no GPU: which requests run together, which
blocks they hold and who waits is decided by the scheduler and the memory managers, and those are
the library's own here. Only how long a step takes is a formula. Nothing imports torch.

Read it in this order: fitted (the constants that were fitted), traces (who comes when, and how
long), catalogue (models and GPUs), cost_model (how long a step takes), systems (paging and its
rivals), requests (a sequence group that generates), simulator (the loop), capacity (the rate that a
system can bear).
"""
