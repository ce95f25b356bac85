"""Shapes in words, inside the signatures: `q: Float[Tensor, "tokens heads head_dim"]`.

`jaxtyping` checks them while the tests run. Users do not need the package: without it, shapes are
documentation only and cost nothing.

The names, with the same meaning everywhere:

    tokens      all query tokens of one step, one sequence after the other
    seqs        sequences in the step   seqs_and_one  one more: where each begins and the last ends
    rows        rows of logits to sample from
    heads       query heads             kv_heads    key/value heads
    head_dim    elements per head       hidden      width of the residual stream
    vocab       tokens in the vocabulary
    layers      transformer blocks
    num_blocks  physical blocks in the pool
    block_size  token slots per block
    max_blocks  columns of the padded block-table tensor
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, array_and_shape):
                return array_and_shape[0]

        Bool = Float = Int = _Unchecked

__all__ = ["Bool", "Float", "Int"]
