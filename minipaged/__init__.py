"""minipaged: PagedAttention, the system behind vLLM, from scratch."""
