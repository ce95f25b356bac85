"""One step after another: requests in, scheduled, computed, sampled, and their outputs back."""
