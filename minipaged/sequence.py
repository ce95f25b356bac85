"""Sequence and SequenceGroup: the nouns that memory, scheduler and engine share.

A sequence is a list of tokens, the first of which have their keys and values in the cache:

    [0, prompt_len)            given by the user
    [prompt_len, num_tokens)   generated
    [0, num_computed_tokens)   keys and values written to the cache by earlier steps
    [num_computed_tokens, num_tokens)  still to be computed: a whole prompt at first, one token
                               while decoding, everything again after a preemption by recomputation

To compute a prompt is called prefill, to go on by one token decode. They are not two states here
but two lengths of that last range. Once it is empty, the last token's logits are known and the next
token is sampled.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto


class SequenceStatus(Enum):
    """Where a group, and so each of its sequences, stands. The scheduler alone changes it."""

    WAITING = auto()  # holds no blocks
    RUNNING = auto()  # its blocks are in the pool
    SWAPPED = auto()  # its blocks are in the swap pool
    FINISHED = auto()  # holds no blocks, and never will again


class Sequence:
    """One prompt and what has been generated after it. Owns the tokens; nobody else edits them.

    A request appends what was sampled, the engine marks what was computed, and the scheduler makes
    it forget, if its blocks are taken away.
    """

    def __init__(self, seq_id: int, prompt_token_ids: Iterable[int]) -> None:
        self.seq_id = seq_id
        self.token_ids = list(prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        self.num_computed_tokens = 0
        assert self.prompt_len > 0, "a sequence begins with at least one token"

    def append(self, token_id: int) -> None:
        """Add a sampled token. Its own keys and values are computed by the next step."""
        self.token_ids.append(token_id)

    def mark_computed(self, num_new_tokens: int) -> None:
        """Note that a step has written the keys and values of so many more tokens."""
        self.num_computed_tokens += num_new_tokens
        assert self.num_computed_tokens <= self.num_tokens, "computed a token that is not there"

    def forget_computed(self) -> None:
        """Note that the cache entries are gone: preempted by recomputation (section 4.5)."""
        self.num_computed_tokens = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    def __repr__(self) -> str:
        return f"Sequence({self.seq_id}, {self.num_computed_tokens}/{self.num_tokens} computed)"


@dataclass(eq=False)
class SequenceGroup:
    """The sequences of one request. They run, wait and are swapped together (section 4.5).

    `num_seats` is how many sequences the request may ever have in one step: 1, or its samples or
    beams. Known before the first fork, it keeps seats free for the forks to come, and decides how
    the group is preempted.
    """

    request_id: str
    sequences: list[Sequence]
    num_seats: int = 1
    status: SequenceStatus = SequenceStatus.WAITING
    arrival: int = 0  # the scheduler's running number, from when it is added
    num_preemptions: int = 0
    finished_ids: set[int] = field(default_factory=set[int])

    @property
    def unfinished(self) -> list[Sequence]:
        """The sequences that still generate, in the order they joined."""
        return [s for s in self.sequences if s.seq_id not in self.finished_ids]

    def __repr__(self) -> str:
        return f"SequenceGroup({self.request_id!r}, {self.status.name}, {self.sequences})"
