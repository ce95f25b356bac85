"""The log-probabilities of chosen tokens: computed on the device, and read on the host later."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minipaged.sampling.rows import SampledToken
from minipaged.utils.device import ComingCopy, to_device
from minipaged.utils.shapes import Bool, Float, Int

SCORED_AT_ONCE = {"cpu": 2**19, "gpu": 2**25}
"""Logits whose log-probabilities are in memory at the same time: 2 and 128 MB in float32. On a CPU
they fit in the cache; a GPU has few launches."""


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
        chosen = to_device(token_ids, logits.device, torch.long)[:, None]  # [rows, 1]
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
        self._table = ComingCopy(table)

    def read(self) -> list[SampledToken]:
        """Wait for the device, and return each row's token with its log-probabilities."""
        table = self._table.wait().tolist()
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
