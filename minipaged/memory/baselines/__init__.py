"""The systems that the papers compare paging with: Orca, FasterTransformer and vAttention."""
