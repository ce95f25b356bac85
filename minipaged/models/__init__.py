"""GPT-2, OPT and LLaMA over a paged KV cache, and the loading of their checkpoints."""
