"""Which requests run in the next step, and which are preempted: pure Python, without torch."""
