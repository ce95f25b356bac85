"""Lab 11: a small model sharded over ranks, which are processes on this machine."""
