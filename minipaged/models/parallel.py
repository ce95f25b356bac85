"""A model cut into equal parts, one per rank: tensor parallelism (Megatron-LM, arXiv 1909.08053).

Three cuts serve all families. The name of a module decides which one applies; modules that are not
named here are whole on every rank.

    cut         a rank has                            how the ranks' results are combined
    column      its share of a matrix's outputs       nothing: the next matrix is cut by rows
    row         its share of a matrix's inputs        all-reduce: the partial sums are added
    vocabulary  its share of the tokens               all-reduce of embeddings; logits are gathered

In a layer, a rank computes the queries, keys and values of its own heads (column), attends with
them, and multiplies the result by its part of the output matrix (row). The feed-forward is cut in
the same way. That makes two all-reduces per layer. The code of the layers does not change:
`cut_model` replaces the modules that it cuts.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.config import ModelConfig
from minipaged.errors import InvalidOption
from minipaged.models.base import Model, Placement
from minipaged.models.empty import Unset
from minipaged.models.linear import Linear, MergedLinear
from minipaged.models.safetensors_reader import StoredTensor
from minipaged.utils.counts import counted
from minipaged.utils.shapes import Float, Int

Range = tuple[int, int]
AllReduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """One part of a model: its rank, the number of ranks, and the all-reduce that joins them."""

    rank: int
    size: int
    all_reduce: AllReduce

    def of(self, count: int) -> Range:
        """Return this rank's share of `count` heads, columns or rows, as [start, stop).

        With fewer than one per rank, neighbouring ranks share one: KV heads are then replicated.
        """
        if count < self.size:
            first = self.rank * count // self.size
            return first, first + 1
        return self.rank * count // self.size, (self.rank + 1) * count // self.size


class Share(NamedTuple):
    """A rank's share of a parameter: these indices of one dimension, then rows of zeros."""

    dim: int
    ranges: tuple[Range, ...]
    padding: int = 0

    @property
    def length(self) -> int:
        return sum(stop - start for start, stop in self.ranges) + self.padding

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Range, Range]]:
        """Yield, per range within [start, stop), its indices in the whole and in this share."""
        begin = 0
        for first, last in self.ranges:
            lowest, highest = max(first, start), min(last, stop)
            if lowest < highest:
                yield (lowest, highest), (begin + lowest - first, begin + highest - first)
            begin += last - first


Shares = dict[str, Share]  # by parameter; parameters not listed are whole


# ---- the modules of a rank -----------------------------------------------------------------------


class RowParallelLinear(Linear):
    """A linear layer in which each rank has some of the inputs; only rank 0 has the bias."""

    all_reduce: AllReduce

    def forward(self, input: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        return self.all_reduce(super().forward(input))


class VocabularyEmbedding(nn.Embedding):
    """An embedding in which each rank has some of the rows; an all-reduce combines them.

    If it is tied to the output matrix, a rank computes the logits of its own tokens.
    """

    first: int  # the token of row 0
    all_reduce: AllReduce

    def forward(self, input: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens hidden"]:
        rows = input - self.first
        elsewhere = (rows < 0) | (rows >= self.num_embeddings)
        found = F.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return self.all_reduce(found.masked_fill_(elsewhere[:, None], 0))


# ---- the cuts ------------------------------------------------------------------------------------

Cut = Callable[[Any, ModelConfig, Part], tuple[nn.Module, dict[str, Share]]]


def _cut_columns(
    module: Linear, sections: list[tuple[int, int]], part: Part
) -> tuple[nn.Module, dict[str, Share]]:
    """A rank's outputs of each section, given as (number of units, outputs per unit)."""
    ranges, sizes, start = list[Range](), list[int](), 0
    for count, width in sections:
        first, last = part.of(count)
        ranges.append((start + first * width, start + last * width))
        sizes.append((last - first) * width)
        start += count * width
    has_bias, share = _has_bias(module), Share(0, tuple(ranges))
    if isinstance(module, MergedLinear):
        new = MergedLinear(module.in_features, tuple(sizes), bias=has_bias)
    else:
        new = Linear(module.in_features, share.length, bias=has_bias)
    return new, {"weight": share, "bias": share}


def _cut_heads(
    module: MergedLinear, config: ModelConfig, part: Part
) -> tuple[nn.Module, dict[str, Share]]:
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    return _cut_columns(module, [(count, config.head_dim) for count in heads], part)


def _cut_outputs(
    module: Linear, config: ModelConfig, part: Part
) -> tuple[nn.Module, dict[str, Share]]:
    sizes = module.sizes if isinstance(module, MergedLinear) else (module.out_features,)
    return _cut_columns(module, [(size, 1) for size in sizes], part)


def _cut_inputs(
    module: Linear, config: ModelConfig, part: Part
) -> tuple[nn.Module, dict[str, Share]]:
    share = Share(1, (part.of(module.in_features),))
    has_bias = _has_bias(module) and part.rank == 0  # so that the sum over ranks contains it once
    new = RowParallelLinear(share.length, module.out_features, bias=has_bias)
    new.all_reduce = part.all_reduce
    shares = {"weight": share}
    return new, shares if has_bias else {**shares, "bias": Share(0, ())}


def _cut_vocabulary(
    module: nn.Embedding | Linear, config: ModelConfig, part: Part
) -> tuple[nn.Module, dict[str, Share]]:
    vocab_size, hidden_size = module.weight.shape
    num_rows = -(-vocab_size // part.size)  # the last rank may have fewer, and is padded
    first, last = (min(vocab_size, (part.rank + i) * num_rows) for i in (0, 1))
    share = Share(0, ((first, last),), padding=num_rows - (last - first))
    if isinstance(module, Linear):
        return Linear(hidden_size, num_rows, bias=False), {"weight": share}
    new = VocabularyEmbedding(num_rows, hidden_size)
    new.first, new.all_reduce = part.rank * num_rows, part.all_reduce
    return new, {"weight": share}


def _has_bias(module: nn.Linear) -> bool:
    return "bias" in dict(module.named_parameters())


CUTS: dict[str, Cut] = {  # by the last part of a module's name
    "embedding": _cut_vocabulary,
    "qkv_proj": _cut_heads,
    "o_proj": _cut_inputs,
    "gate_up_proj": _cut_outputs,
    "up_proj": _cut_outputs,
    "down_proj": _cut_inputs,
    "head": _cut_vocabulary,
}


def cut_model(model: Model, part: Part) -> Shares:
    """Replace the modules that are cut by this rank's parts, in a model on the "meta" device.

    Afterwards `model.config` has the heads of this rank.

    Raises InvalidOption unless all ranks get equal parts.
    """
    refuse_uneven_parts(model, part.size)
    config, shares = model.config, Shares()
    with torch.device("meta"), Unset():
        for name, module in list(model.named_modules()):
            cut = CUTS.get(name.rpartition(".")[2])
            if cut is None:
                continue
            new, found = cut(module, config, part)
            model.set_submodule(name, new)
            shares.update((f"{name}.{leaf}", share) for leaf, share in found.items())
    heads = (part.of(count) for count in (config.num_heads, config.num_kv_heads))
    num_heads, num_kv_heads = (last - first for first, last in heads)
    model.config = replace(config, num_heads=num_heads, num_kv_heads=num_kv_heads)
    return shares


def refuse_uneven_parts(model: Model, size: int) -> None:
    """Raise InvalidOption unless a model can be divided evenly among the ranks."""
    config = model.config
    counts = {config.num_heads: "query head"}
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            counts[cast(nn.Linear, module).in_features] = "feed-forward unit"

    def obstacle(ranks: int) -> str | None:
        for count, what in counts.items():
            if count % ranks:
                return counted(count, what)
        kv_heads = config.num_kv_heads
        return counted(kv_heads, "KV head") if kv_heads % ranks and ranks % kv_heads else None

    if what := obstacle(size):
        fitting = (str(n) for n in range(1, config.num_heads + 1) if obstacle(n) is None)
        raise InvalidOption(
            f"tensor_parallel_size is {size}, but {what} cannot be divided evenly among {size} "
            f"ranks: choose {' or '.join(fitting)}.",
            "tensor_parallel_size",
        )


# ---- filling the parts ---------------------------------------------------------------------------


def part_of(
    stored: StoredTensor, placement: Placement, model: Model, shares: Shares
) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Yield the pieces of a stored tensor that a rank reads, and where they go."""
    share = shares.get(placement.parameter)
    if share is None:
        yield stored, placement.place_in(model)
        return
    # Tensors merged into one parameter are concatenated in dimension 0.
    start, stop = (placement.start, placement.stop) if share.dim == 0 else (0, sys.maxsize)
    for (first, last), (begin, end) in share.pieces(start, stop):
        place = model.get_parameter(placement.parameter).narrow(share.dim, begin, end - begin)
        if placement.transposed:  # the file stores the transposed matrix
            yield stored.part(1 - share.dim, first - start, last - start), place.t()
        else:
            yield stored.part(share.dim, first - start, last - start), place


def clear_padding(model: Model, shares: Shares) -> None:
    """Zero the rows that pad a vocabulary that the ranks do not divide evenly."""
    for name, share in shares.items():
        if share.padding:
            model.get_parameter(name)[-share.padding :] = 0


def fill_with_random_weights(
    model: Model, shapes: Mapping[str, torch.Size], shares: Shares
) -> None:
    """Fill the parameters with random values, always the same ones on one kind of device.

    Values are small and around 0, as before training; the weights of norms are 1.

    Args:
        shapes: of the whole parameters, by name. Values are drawn for whole parameters, so that
            the parts of all ranks belong to the same model.
    """
    own = dict(model.named_parameters())
    generator = torch.Generator(model.embedding.weight.device).manual_seed(0)
    for name, shape in shapes.items():
        share = shares.get(name)
        if len(shape) == 1:
            if name in own:
                own[name].fill_(float(name.endswith("weight")))
        elif share is None:
            own[name].normal_(0.0, 0.02, generator=generator)
        else:
            whole = own[name].new_empty(shape).normal_(0.0, 0.02, generator=generator)
            for (first, last), (begin, end) in share.pieces(0, sys.maxsize):
                drawn = whole.narrow(share.dim, first, last - first)
                own[name].narrow(share.dim, begin, end - begin).copy_(drawn)
