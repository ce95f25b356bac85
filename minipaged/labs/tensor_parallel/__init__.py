"""Lab 11: a small model cut into ranks, which are processes on this machine."""
