"""Observing scheduler and memory: a stream of events, its file, and its pictures."""
