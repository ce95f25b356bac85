"""The programs of the ranks in the tests of lab 11. Each rank runs one, by name, in a process."""

import pytest
import torch
from torch import Tensor

from minipaged.engine.custom_parts import find_helper, read_custom_parts
from minipaged.labs.plugin import PARTS
from minipaged.labs.tensor_parallel.model import Config, Layer, Linear, Weights, share

MODULE = "minipaged.labs.tensor_parallel.rank"

HEADS = {
    "as_many_kv_heads": Config(vocab_size=32, num_heads=4, num_kv_heads=4, head_dim=8),
    "fewer_kv_heads": Config(vocab_size=32, num_heads=4, num_kv_heads=2, head_dim=8),
    "one_kv_head_for_both": Config(vocab_size=32, num_heads=4, num_kv_heads=1, head_dim=8),
    "odd_vocabulary": Config(vocab_size=37, num_heads=4, num_kv_heads=2, head_dim=8),
}


def random_weights(config: Config, num_layers: int = 2, bias: bool = True) -> Weights:
    """A model with random weights, the same in every call."""
    source = torch.Generator().manual_seed(7)
    hidden, inner = 24, 40
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    def linear(outputs: int, inputs: int) -> Linear:
        return Linear(numbers(outputs, inputs) / inputs**0.5, numbers(outputs) if bias else None)

    layers = tuple(
        Layer(
            attention_norm=numbers(hidden),
            q=linear(q_size, hidden),
            k=linear(kv_size, hidden),
            v=linear(kv_size, hidden),
            o=linear(hidden, q_size),
            mlp_norm=numbers(hidden),
            gate=linear(inner, hidden),
            up=linear(inner, hidden),
            down=linear(hidden, inner),
        )
        for _ in range(num_layers)
    )
    return Weights(config, numbers(config.vocab_size, hidden), layers, numbers(hidden))


def same(yours: Tensor | None, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Fails with the place where two tensors differ most."""
    if yours is None:
        pytest.fail(f"{what}: yours None, expected a tensor of {list(expected.shape)}")
    if yours.shape != expected.shape:
        pytest.fail(f"{what}: yours has shape {list(yours.shape)}, not {list(expected.shape)}")
    error = (yours - expected).abs() / expected.abs().clamp(min=1.0)
    if not error.max() <= tolerance:  # nor NaN
        place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        pytest.fail(
            f"{what}: at {list(place)} yours {yours[place]:.6g}, expected {expected[place]:.6g}"
        )


def keeps_only(tensor: Tensor) -> bool:
    """Whether a tensor has its own storage. A view would keep the whole tensor in memory."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


# ---- programs of a rank --------------------------------------------------------------------------


def own(parts: list[str], name: str):
    """The student's function or class in this process, or the library's."""
    return find_helper(f"{MODULE}.{name}", read_custom_parts(parts, PARTS))


def product(rank: int, num_ranks: int, parts: list[str], x: Tensor, layer: Linear):
    """A linear layer cut by inputs: its outputs, and its inputs after the call."""
    mine = share(x.shape[1], rank, num_ranks)
    inputs = x[:, mine.start : mine.stop].clone()
    out = own(parts, "row_linear")(inputs, own(parts, "cut_rows")(layer, mine))
    return out, inputs


def embedded(rank: int, num_ranks: int, parts: list[str], token_ids: Tensor, table: Tensor):
    rows = own(parts, "cut_vocabulary")(table, rank, num_ranks)
    return own(parts, "embed")(token_ids, rows)


def gathered(rank: int, num_ranks: int, parts: list[str], hidden: Tensor, table: Tensor):
    rows = own(parts, "cut_vocabulary")(table, rank, num_ranks)
    return own(parts, "gather_logits")(hidden, rows, len(table))


def steps(rank: int, num_ranks: int, parts: list[str], weights: Weights, prompts: list):
    """The logits of each prompt."""
    one = own(parts, "Rank")(weights, rank, num_ranks)
    return [one.step(prompt) for prompt in prompts]


def messages(rank: int, num_ranks: int, parts: list[str], weights: Weights, sent: list):
    """The message that other ranks receive when rank 0 sends this one."""
    one = own(parts, "Rank")(weights, rank, num_ranks)
    return [one.receive() if rank else one.send(token_ids) for token_ids in sent]


def stories(rank: int, num_ranks: int, parts: list[str], weights: Weights, asked: list):
    """The tokens that rank 0 generates. The other ranks work until it stops them.

    `asked` has pairs of a prompt and a number of tokens.
    """
    one = own(parts, "Rank")(weights, rank, num_ranks)
    if rank:
        return one.work()
    generated = [one.generate(prompt, num_tokens) for prompt, num_tokens in asked]
    one.stop()
    return generated
