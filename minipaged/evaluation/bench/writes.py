"""All writes to the pool: storing new keys and values, and copying blocks.

Storing moves few bytes, so it is compared with the same work in PyTorch: several launches instead
of one. Copying is compared with a large copy of as many bytes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minipaged.attention import reference
from minipaged.attention.backend import choose_backend
from minipaged.attention.kv_cache import copy_blocks
from minipaged.evaluation.bench.cases import BLOCK_SIZE, Case, Heads, Inputs, make_inputs
from minipaged.evaluation.bench.kernel import Row
from minipaged.evaluation.bench.timing import Work, copy_work, median_seconds
from minipaged.models.rope import rotate


def measure_writes(
    heads: Heads,
    num_layers: int,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    step_sizes: tuple[int, ...] = (64, 1024),
    num_pairs: int = 64,
) -> Iterator[Row]:
    """Measure storing for steps of `step_sizes` tokens, and copying blocks over all layers."""
    for num_tokens in step_sizes:
        yield from _measure_store(Case(heads, num_tokens, BLOCK_SIZE), backend, device, dtype)
    yield from _measure_copy(heads, num_layers, num_pairs, backend, device, dtype)


def _measure_store(
    case: Case, backend: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Row]:
    inputs = make_inputs(case, device, dtype)
    k, v = inputs.keys[:, :, -1], inputs.values[:, :, -1]  # [tokens, kv_heads, head_dim]
    angles = inputs.batch.positions[:, None, None].float() + torch.linspace(
        0, 1, case.heads.head_dim // 2, device=device
    )  # [tokens, 1, half]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    chosen = choose_backend(backend, device, case.heads.head_dim)
    batch = chosen.prepare(inputs.batch, inputs.k_cache, inputs.q.shape[1], dtype)  # once per step

    def store() -> None:
        chosen.store_kv(k, v, inputs.k_cache, inputs.v_cache, batch)

    def store_by_index() -> None:
        reference.store_kv(k, v, inputs.k_cache, inputs.v_cache, inputs.batch)

    def rotate_and_store() -> Tensor:
        turned = rotate(k, cos, sin)
        chosen.store_kv(turned, v, inputs.k_cache, inputs.v_cache, batch)
        return rotate(inputs.q, cos, sin)

    works: dict[str, Work] = {"index": store_by_index, backend: store}
    if backend == "triton":
        from minipaged.attention.triton.store_kv import rope_and_store_kv

        def fused() -> Tensor:
            pools = inputs.k_cache, inputs.v_cache
            return rope_and_store_kv(inputs.q, k, v, cos, sin, *pools, inputs.batch)

        works |= {"rotate, then triton": rotate_and_store, "RoPE within triton": fused}
    _check_stores(inputs, works)
    seconds = median_seconds(works, device)
    for name in works:
        baseline = seconds["rotate, then triton" if "RoPE" in name or "rotate" in name else "index"]
        yield Row(
            "store",
            case.heads.name,
            case.num_seqs,
            "1",
            "auto",
            name,
            seconds[name],
            None,
            seconds[name] / baseline,
        )


def _check_stores(inputs: Inputs, works: dict[str, Work]) -> None:
    """Check that all store variants write the same pool, with and without fused RoPE."""
    found: dict[bool, tuple[str, Tensor]] = {}
    for name, work in works.items():
        assert isinstance(inputs.k_cache, Tensor)
        inputs.k_cache.zero_()
        work()
        with_rope = "RoPE" in name or "rotate" in name
        first, expected = found.setdefault(with_rope, (name, inputs.k_cache.clone()))
        # When fused, a rotated key is rounded only once, at the end.
        torch.testing.assert_close(
            inputs.k_cache, expected, rtol=0.02, atol=0.05, msg=f"{name} differs from {first}"
        )


def _measure_copy(
    heads: Heads,
    num_layers: int,
    num_pairs: int,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Row]:
    shape = (num_layers, 2, 4 * num_pairs, heads.kv_heads, BLOCK_SIZE, heads.head_dim)
    pool = torch.randn(shape, dtype=dtype, device=device)
    pairs = torch.randperm(4 * num_pairs, device=device)[: 2 * num_pairs].view(-1, 2)
    works: dict[str, Work] = {}
    copiers: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
        "index": copy_blocks,
        backend: choose_backend(backend, device, heads.head_dim).copy_blocks,
    }
    for name, copier in copiers.items():
        pool[:, :, pairs[:, 1]] = 0
        copier(pool, pool, pairs)
        assert torch.equal(pool[:, :, pairs[:, 1]], pool[:, :, pairs[:, 0]]), f"{name} copied wrong"
        works[name] = lambda copier=copier: copier(pool, pool, pairs)
    copy, copy_bytes = copy_work(device)
    seconds = median_seconds({"copy": copy, **works}, device)
    moved = 2 * num_pairs * pool[:, :, 0].numel() * pool.itemsize
    for name in works:
        floor = moved / (copy_bytes / seconds["copy"])
        yield Row(
            f"copy, {num_layers} layers",
            heads.name,
            num_pairs,
            f"{BLOCK_SIZE}",
            "auto",
            name,
            seconds[name],
            100 * floor / seconds[name],
            seconds[name] / seconds["index"],
        )
