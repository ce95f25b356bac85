"""Serving without a model: the real scheduler and memory managers under a virtual clock.

The paper's results on memory and queues need no GPU: which requests run together, which blocks they
hold and which of them wait is decided by the scheduler and the memory managers, and those are
the library's own here. Only how long a step takes is a formula. Nothing imports torch.

Read it in this order: fitted (the constants that were fitted), traces (who comes when, and how
long), catalogue (models and GPUs), interconnect (what several GPUs send each other), cost_model
(how long a step takes), systems (paging and its baselines), requests (a sequence group that
generates), simulator (the loop), capacity (the request rate that a system sustains).
"""
