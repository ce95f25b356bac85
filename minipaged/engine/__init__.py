"""The engine: requests in, steps scheduled, computed and sampled, outputs back."""
