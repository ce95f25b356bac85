"""What one step does: the scheduler's decision, and the message to the device side made from it.

A `SchedulerOutput` refers to live sequences and groups; the engine and the layers above it read it.
A `StepInput` holds only plain numbers, so that it can be pickled and sent to another process: no
layer below the scheduler sees a live sequence. In the paper's words (section 4.6), the scheduler
"first prepares the message with input token IDs for each request in the batch, as well as the
block table for each request", and sends it to the workers.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from minipaged.memory import BlockPair
from minipaged.sequence import Sequence, SequenceGroup


class ScheduledSequence(NamedTuple):
    """One sequence's part in a step: `num_new_tokens` of its uncomputed tokens, from the first."""

    group: SequenceGroup
    seq: Sequence
    num_new_tokens: int
    samples: bool  # all tokens are then computed, so the next one can be sampled


@dataclass(frozen=True)
class SchedulerOutput:
    """The decision for one step. Block operations run first, in this order, then the model."""

    swap_out: tuple[BlockPair, ...] = ()  # (pool block, swap block)
    swap_in: tuple[BlockPair, ...] = ()  # (swap block, pool block)
    copies: tuple[BlockPair, ...] = ()  # copy-on-write: (source, destination)
    sequences: tuple[ScheduledSequence, ...] = ()
    preempted: tuple[SequenceGroup, ...] = ()
    ended: tuple[SequenceGroup, ...] = ()  # out of memory, or with broken logits
    # Prompt tokens of the admitted groups that were looked up in the prefix cache, and found.
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0


@dataclass
class Draft:
    """An unfinished `SchedulerOutput`, used only by `schedule()` and its helpers."""

    tokens_left: int  # of max_num_batched_tokens
    swap_out: list[BlockPair] = field(default_factory=list[BlockPair])
    swap_in: list[BlockPair] = field(default_factory=list[BlockPair])
    copies: list[BlockPair] = field(default_factory=list[BlockPair])
    sequences: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])
    preempted: list[SequenceGroup] = field(default_factory=list[SequenceGroup])
    ended: list[SequenceGroup] = field(default_factory=list[SequenceGroup])
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0


class SequenceInput(NamedTuple):
    """One sequence's part in a `StepInput`."""

    seq_id: int
    # The tokens to compute, at positions context_len and up. Number -1 - r is a pending token: the
    # one that row r of the step before sampled, which only the device knows yet.
    token_ids: list[int]
    context_len: int  # tokens of the sequence whose keys and values are in the cache
    block_table: list[int]  # physical blocks, in logical order
    num_logits: int = 1  # return the logits of this many of its last tokens


@dataclass(frozen=True)
class StepInput:
    """One step for the device side, in plain numbers: block operations first, then the model."""

    sequences: tuple[SequenceInput, ...]
    swap_out: tuple[BlockPair, ...] = ()
    swap_in: tuple[BlockPair, ...] = ()
    copies: tuple[BlockPair, ...] = ()
