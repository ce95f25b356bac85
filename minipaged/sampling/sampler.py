"""Chooses a token from each row of logits, for all rows of a step at once.

A row passes these stages, in this order, as in vLLM and in transformers:

    `adjust`, a custom part               change which token is likeliest
    argmax                                a greedy row ends here
    temperature, min_p, top_k, top_p      change and cut the distribution
    draw                                  one token, by one random number

A stage runs only for the rows that need it: a batch of plain greedy requests costs one argmax, and
no row depends on how the other rows are sampled.

The host waits for a GPU only when the results are read. One transfer returns all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minipaged.sampling.adjust import adjust
from minipaged.sampling.draw import draw
from minipaged.sampling.explain import explain_error
from minipaged.sampling.params import GREEDY_BELOW
from minipaged.sampling.rows import SampledToken, SamplingRow
from minipaged.utils.device import to_device
from minipaged.utils.shapes import Bool, Float, Int

SCORED_AT_ONCE = {"cpu": 2**19, "gpu": 2**25}
"""Logits whose log-probabilities are in memory at the same time: 2 and 128 MB in float32. On a CPU
they fit in the cache; a GPU has few launches."""

AdjustLogits = Callable[[Tensor, Sequence[SamplingRow]], Tensor]
"""A custom part: maps the logits of all rows, [rows, vocab], to new ones of the same shape."""


class Sampler:
    """Chooses the next token of every row. It has no state between steps.

    Args:
        adjust_logits: a custom part, called after `adjust` with the logits of all rows.
    """

    def __init__(self, adjust_logits: AdjustLogits | None = None) -> None:
        self._adjust_logits = adjust_logits

    def sample(self, logits: Float[Tensor, "rows vocab"], rows: Sequence[SamplingRow]) -> "Draws":
        """Choose the next token of each row; `logits[i]` belongs to `rows[i]` and is kept.

        It does not wait for the device.
        """
        assert len(rows) == logits.shape[0], f"{len(rows)} rows for {logits.shape[0]} of logits"
        raw = adjusted = logits.float()
        faults: dict[int, Exception] = {}
        params = [row.params for row in rows]
        if any(each.adjusts_logits for each in params):
            adjusted, faults = adjust(raw, rows)
        if self._adjust_logits is not None:
            adjusted = self._adjust_logits(adjusted.clone(), rows)
        if adjusted.is_cpu and adjusted.dtype is torch.float32:
            # On a CPU, PyTorch's argmax takes ten times as long as NumPy's.
            token_ids = torch.from_numpy(adjusted.detach().numpy().argmax(-1))
        else:
            token_ids = adjusted.argmax(-1)  # [rows]; the lowest id of equals
        has_choice = None if adjusted is raw else adjusted.gather(-1, token_ids[:, None]).isfinite()
        chance = [i for i, each in enumerate(params) if each.temperature >= GREEDY_BELOW]
        if chance:
            places = to_device(chance, logits.device)
            token_ids[places] = draw(adjusted[places], [rows[i] for i in chance])
        scores = Scores(raw, token_ids, [each.logprobs for each in params], has_choice)
        return Draws(token_ids, scores, raw, adjusted, faults)


class Scores:
    """The log-probability of one token per row, and those of the likeliest tokens.

    The logprob is NaN where `has_choice` is False, and in rows with NaN, +inf or only -inf.

    Args:
        logits: of which the log-probabilities are computed.
        token_ids: the chosen token of each row.
        num_top: `num_top[i]` is the number of likeliest tokens to return; -1: all, None: none and
            no rank.
        has_choice: whether the row has a token that could be chosen.
    """

    def __init__(
        self,
        logits: Float[Tensor, "rows vocab"],
        token_ids: Sequence[int] | Int[Tensor, " rows"],
        num_top: Sequence[int | None],
        has_choice: Bool[Tensor, "rows 1"] | None = None,
    ) -> None:
        if not isinstance(token_ids, Tensor):
            token_ids = to_device(token_ids, logits.device, torch.long)
        chosen = token_ids[:, None]  # [rows, 1]
        vocab_size = logits.shape[-1]
        asked = [vocab_size if n == -1 else min(n, vocab_size) for n in num_top if n is not None]
        self._num_top = num_top if asked else None
        self._most = max(asked, default=0)
        at_once = max(1, SCORED_AT_ONCE["cpu" if logits.is_cpu else "gpu"] // vocab_size)  # rows
        tables: list[Tensor] = []
        for some, ids in zip(logits.split(at_once), chosen.split(at_once), strict=True):
            logprobs = some.float().log_softmax(-1)  # [rows, vocab]
            results = [ids, logprobs.gather(-1, ids)]
            if asked:
                results.append((logprobs > results[1]).sum(-1, keepdim=True) + 1)  # the rank
            if self._most > 0:
                values, top_ids = logprobs.topk(self._most, dim=-1)  # [rows, most], for all rows
                results += [top_ids, values]
            tables.append(torch.cat([result.double() for result in results], dim=-1))
        # One table, because each transfer waits. Doubles represent any id exactly.
        table = torch.cat(tables)
        if has_choice is not None:
            table[:, 1:2].masked_fill_(~has_choice, torch.nan)
        self._table = table.to("cpu", non_blocking=True)  # from a GPU: to pinned memory
        self._arrival = None
        if table.is_cuda:
            self._arrival = torch.cuda.current_stream(table.device).record_event()

    def read(self) -> list[SampledToken]:
        """Wait for the device, and return each row's token with its log-probabilities."""
        if self._arrival is not None:
            self._arrival.synchronize()
        table = self._table.tolist()
        if self._num_top is None:
            return [SampledToken(int(token_id), logprob) for token_id, logprob in table]
        sampled, most = list[SampledToken](), self._most
        for (token_id, logprob, rank, *top), count in zip(table, self._num_top, strict=True):
            token = int(token_id)
            if count is None:
                sampled.append(SampledToken(token, logprob))
                continue
            num_found = most if count == -1 else min(count, most)
            found = {int(top[k]): top[most + k] for k in range(num_found)}
            found.setdefault(token, logprob)  # if it is not among them, it is the least likely
            sampled.append(SampledToken(token, logprob, found, rank=int(rank)))
        return sampled


@dataclass
class Draws:
    """The chosen tokens of a step, still on the device."""

    token_ids: Int[Tensor, " rows"]
    _scores: Scores
    _raw: Float[Tensor, "rows vocab"]
    _adjusted: Float[Tensor, "rows vocab"]
    _faults: dict[int, Exception]

    def read(self) -> list[SampledToken]:
        """Wait for the device, and return the token of each row."""
        sampled = self._scores.read()
        for i, token in enumerate(sampled):
            if token.logprob != token.logprob:  # NaN
                error = explain_error(self._raw[i], self._adjusted[i])
                sampled[i] = token._replace(error=error)
        for i, fault in self._faults.items():
            sampled[i] = sampled[i]._replace(error=fault)
        return sampled
