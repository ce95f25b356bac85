"""Converts a `StepInput` to the integers of one message and back (section 4.6's control message).

    number of swap-outs, swap-ins, copies, sequences
    the pairs of blocks: from, to, from, to, ...
    for each sequence: its id, context length, number of logits, and three counts: new tokens,
        blocks that the receiver already has, new blocks; then the new tokens and the new blocks

A block table is sent as a difference: for a sequence of the last step, the receiver already has the
table, which has usually grown by 0 or 1 blocks. The prefix cache may have replaced its last full
block by an equal one: the table is sent again from the first block that differs.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from minipaged.memory import BlockPair
from minipaged.scheduler.output import SequenceInput, StepInput


class StepEncoder:
    """The sender's side. It stores the block tables of the last step."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}

    def encode(self, step: StepInput) -> list[int]:
        """Encode a step as the integers of one message."""
        pairs = (step.swap_out, step.swap_in, step.copies)
        numbers = [*map(len, pairs), len(step.sequences)]
        numbers += chain.from_iterable(chain.from_iterable(pairs))
        tables: dict[int, list[int]] = {}
        for seq_id, token_ids, context_len, table, num_logits in step.sequences:
            num_known = _num_equal(self._tables.get(seq_id, []), table)
            new = table[num_known:]
            counts = len(token_ids), num_known, len(new)
            numbers += (seq_id, context_len, num_logits, *counts, *token_ids, *new)
            tables[seq_id] = table
        self._tables = tables
        return numbers


class StepDecoder:
    """The receiver's side, which must see every message."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}

    def decode(self, message: Sequence[int]) -> StepInput:
        """Decode the step that `StepEncoder.encode` encoded."""
        numbers = iter(message)
        *num_pairs, num_sequences = islice(numbers, 4)
        swap_out, swap_in, copies = (_read_pairs(numbers, count) for count in num_pairs)
        sequences: list[SequenceInput] = []
        for _ in range(num_sequences):
            seq_id, context_len, num_logits, num_tokens, num_known, num_new = islice(numbers, 6)
            token_ids = list(islice(numbers, num_tokens))
            table = [*self._tables.get(seq_id, ())[:num_known], *islice(numbers, num_new)]
            sequences.append(SequenceInput(seq_id, token_ids, context_len, table, num_logits))
        self._tables = {each.seq_id: each.block_table for each in sequences}
        return StepInput(tuple(sequences), swap_out, swap_in, copies)


def _num_equal(known: list[int], table: list[int]) -> int:
    """The number of equal blocks at the beginning of two tables."""
    if table[: len(known)] == known:  # nearly always
        return len(known)
    pairs = zip(known, table, strict=False)
    differing = (i for i, (one, other) in enumerate(pairs) if one != other)
    return next(differing, len(table))  # none differs: the table has become shorter


def _read_pairs(numbers: Iterator[int], count: int) -> tuple[BlockPair, ...]:
    return tuple((next(numbers), next(numbers)) for _ in range(count))
