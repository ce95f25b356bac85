"""What one step does, as the scheduler decides it and everybody below carries it out."""

from dataclasses import dataclass, field
from typing import NamedTuple

from minipaged.memory import BlockPair
from minipaged.sequence import Sequence, SequenceGroup


class ScheduledSequence(NamedTuple):
    """One sequence's part in a step: its first `num_new_tokens` uncomputed tokens are computed."""

    group: SequenceGroup
    seq: Sequence
    num_new_tokens: int
    samples: bool  # nothing is left uncomputed after it, so the next token can be sampled


@dataclass
class SchedulerOutput:
    """What one step does. The block operations come first, in this order, then the model.

    `schedule()` fills it in; everybody else only reads it.
    """

    tokens_left: int  # of max_num_batched_tokens
    swap_out: list[BlockPair] = field(default_factory=list[BlockPair])
    swap_in: list[BlockPair] = field(default_factory=list[BlockPair])
    copies: list[BlockPair] = field(default_factory=list[BlockPair])
    sequences: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])
    preempted: list[SequenceGroup] = field(default_factory=list[SequenceGroup])
    ended: list[SequenceGroup] = field(default_factory=list[SequenceGroup])  # for want of memory

    def add(self, group: SequenceGroup) -> None:
        """Give each sequence of a group as many of the tokens that are left as it can use.

        The sequences of a group sample in the same step, for the next beams are chosen among the
        candidates of all. So while one is behind or absent, because the group is recomputed, the
        others wait with their last token.
        """
        several = len(group.sequences) + len(group.awaiting_refork) > 1
        last_token_waits = several and not group.is_decoding
        for seq in group.sequences:
            left = seq.num_uncomputed_tokens
            num_new_tokens = min(left - 1 if last_token_waits else left, self.tokens_left)
            if num_new_tokens > 0:
                samples = num_new_tokens == left
                self.sequences.append(ScheduledSequence(group, seq, num_new_tokens, samples))
                self.tokens_left -= num_new_tokens
