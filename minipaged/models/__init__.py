"""Small GPT-2, OPT and LLaMA models over a paged KV cache, and how their checkpoints load."""
