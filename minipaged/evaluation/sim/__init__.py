"""Serving without a model: the real scheduler and memory managers with a virtual clock.

The paper's results on memory and queues need no GPU: scheduler and memory managers decide which
requests run together, which blocks they use and which wait, and the simulator uses the library's
own. Only the duration of a step is a formula. Nothing imports torch.

Read it in this order: fitted (the constants that were fitted), traces (arrivals and lengths of
requests), catalogue (models and GPUs), interconnect (communication between GPUs), cost_model
(how long a step takes), systems (paging and its baselines), requests (a sequence group that
generates), simulator (the loop), capacity (the request rate that a system sustains).
"""
