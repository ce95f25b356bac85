"""What can be observed of scheduler and memory: one stream of events, its file, its pictures."""
