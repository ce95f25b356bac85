"""Who runs in the next step, and who is preempted. Pure Python: nothing here imports torch."""
