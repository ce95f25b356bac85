"""Keys and values in a paged cache, and the attention that reads them through block tables."""
