"""The systems that paging is compared with: Orca, FasterTransformer and vAttention."""
