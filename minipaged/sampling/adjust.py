"""Changes to logits before a token is chosen.

The order is vLLM's: tokens that are not allowed, biases, a request's own functions, penalties. The
logits of a row without any of them stay bit-identical.
"""

from collections.abc import Iterable, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from minipaged.sampling.params import LogitsProcessor, SamplingParams
from minipaged.sampling.row_tensors import asking, column, places
from minipaged.sampling.rows import SamplingRow
from minipaged.tokenizer.base import Tokenizer
from minipaged.utils.device import to_device
from minipaged.utils.shapes import Float

Faults = dict[int, Exception]
"""The exceptions that logits processors raised, by row index."""


def adjust(
    logits: Float[Tensor, "rows vocab"], rows: Sequence[SamplingRow]
) -> tuple[Float[Tensor, "rows vocab"], Faults]:
    """Return changed logits [rows, vocab] and the faults; the given logits stay unchanged."""
    logits = logits.clone()
    # index_put_, because assigning a number copies it from the host, which waits for the GPU.
    if limited := asking(rows, lambda p: p.allowed_token_ids is not None):
        allowed = places([rows[i].params.allowed_token_ids or () for i in limited], logits.device)
        mask = torch.ones(len(limited), logits.shape[-1], dtype=torch.bool, device=logits.device)
        mask.index_put_(allowed, mask.new_zeros(()))
        where = to_device(limited, logits.device)
        logits[where] = logits[where].masked_fill(mask, -torch.inf)
    too_early = [row.end_token_ids if row.position < row.params.min_tokens else () for row in rows]
    for forbidden in (too_early, [bad_word_ends(row) for row in rows]):
        if any(forbidden):
            logits.index_put_(places(forbidden, logits.device), logits.new_full((), -torch.inf))
    if any(biased := [row.params.logit_bias or {} for row in rows]):
        values = [float(value) for bias in biased for value in bias.values()]
        ids = [[int(token_id) for token_id in bias] for bias in biased]
        logits[places(ids, logits.device)] += column(values, logits.device)[:, 0]
    faults = run_processors(logits, rows)
    if penalised := asking(rows, _has_penalty):
        where = to_device(penalised, logits.device)
        logits[where] = penalise(logits[where], [rows[i] for i in penalised])
    return logits, faults


def bad_word_ends(row: SamplingRow) -> list[int]:
    """Return the tokens that would complete a bad word."""
    output = row.output_token_ids
    last = output[-1] if output else None
    return [
        word[-1]
        for word in row.bad_words  # up to thousands: most do not pass the first comparison
        if len(word) == 1
        or (word[-2] == last and list(output[max(0, len(output) + 1 - len(word)) :]) == word[:-1])
    ]


def bad_words_in_tokens(words: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Encode each word as at the beginning of a text, and as after a space."""
    found: list[list[int]] = []
    for word in words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            token_ids = tokenizer.encode(text, add_special_tokens=False)
            if token_ids and token_ids not in found:
                found.append(token_ids)
    return found


# -- A request's own functions ----------------------------------------------------------------


def run_processors(logits: Float[Tensor, "rows vocab"], rows: Sequence[SamplingRow]) -> Faults:
    """Replace each row by the result of its logits processors, unless one of them raises."""
    faults: Faults = {}
    for i, row in enumerate(rows):
        for process in row.params.logits_processors or ():
            try:
                logits[i] = _checked(_call(process, row, logits[i].clone()), logits[i])
            except Exception as error:
                faults[i] = error
                break
    return faults


def _call(process: LogitsProcessor, row: SamplingRow, logits: Tensor) -> Any:
    arguments: list[Any] = [list(row.output_token_ids), logits]
    if _takes_the_prompt(process):
        arguments.insert(0, list(row.prompt_token_ids))
    return process(*arguments)


def _takes_the_prompt(process: LogitsProcessor) -> bool:
    named = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in named for each in signature(process).parameters.values()) == 3


def _checked(result: Any, logits: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != logits.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(
            f"a logits processor returned {got}: return the row of logits, of shape "
            f"{tuple(logits.shape)}"
        )
    return result


# -- Penalties --------------------------------------------------------------------------------


def penalise(
    logits: Float[Tensor, "rows vocab"], rows: Sequence[SamplingRow]
) -> Float[Tensor, "rows vocab"]:
    """Make repeated tokens less likely.

    `repetition_penalty` counts prompt and output, the other two count only the output.
    """
    device, params = logits.device, [row.params for row in rows]
    times_generated = torch.zeros_like(logits)  # [rows, vocab]
    where = places([row.output_token_ids for row in rows], device)
    times_generated.index_put_(where, times_generated.new_ones(()), accumulate=True)
    was_there = times_generated > 0  # [rows, vocab]
    where = places([row.prompt_token_ids for row in rows], device)
    was_there.index_put_(where, was_there.new_ones(()))

    # A logit has either sign, so lowering it divides above zero and multiplies below.
    repetition = column([p.repetition_penalty for p in params], device)
    lowered = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(was_there, lowered, logits)
    logits = logits - times_generated * column([p.frequency_penalty for p in params], device)
    presence = column([p.presence_penalty for p in params], device)
    return logits - (times_generated > 0) * presence


def _has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )
