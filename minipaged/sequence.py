"""Sequence and SequenceGroup, which memory, scheduler and engine share.

A sequence is a list of tokens. The keys and values of its first tokens are in the cache:

    [0, prompt_len)            given by the user
    [prompt_len, num_tokens)   generated
    [0, num_computed_tokens)   keys and values in the KV cache: written by earlier steps, shared
                               with the parent of a fork, or found in the prefix cache
    [num_computed_tokens, num_tokens)  not yet computed: the whole prompt at first, one token while
                               decoding, everything after a preemption by recomputation

Of the last range, the first `num_in_flight` tokens belong to a step that was launched and whose
results have not been read (see `engine/overlap.py`). Without overlapped steps, it is 0.

Computing a prompt is called prefill, computing one more token decode. They are not two states but
two lengths of the last range. Once it is empty, the last token's logits are available and the next
token is sampled.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto


class SequenceStatus(Enum):
    """The queue of a group. Only the scheduler writes it."""

    WAITING = auto()  # holds no blocks
    RUNNING = auto()  # its blocks are in the pool
    SWAPPED = auto()  # its blocks are in the swap pool
    FINISHED = auto()  # holds no blocks any more


class Sequence:
    """One prompt and its generated tokens. Each field has one writer.

    token_ids            the request, which appends sampled tokens
    num_in_flight        the engine
    num_computed_tokens  the scheduler: the cached tokens on admission, plus those of each step, 0
                         after a preemption by recomputation
    num_cached_tokens    the scheduler, on the first admission
    all others           fixed at construction

    Args:
        max_output_len: maximum tokens to generate, used only by memories that reserve. None: up to
            the end of the model's context.
        cache_salt: only sequences with equal salts share cached blocks; None equals None.
        reads_cache: False computes the whole prompt, for example for its logits.
    """

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: Iterable[int],
        *,
        max_output_len: int | None = None,
        cache_salt: str | None = None,
        reads_cache: bool = True,
    ) -> None:
        self.seq_id = seq_id
        self.token_ids = list(prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.max_output_len = max_output_len
        self.num_cached_tokens: int | None = None  # None until the first admission
        self.cache_salt = cache_salt
        self.reads_cache = reads_cache
        assert self.prompt_len > 0, "a sequence begins with at least one token"

    def fork(self, child_id: int) -> "Sequence":
        """Return a second sequence with the same tokens (section 4.4)."""
        child = Sequence(
            child_id,
            self.token_ids,
            max_output_len=self.max_output_len,
            cache_salt=self.cache_salt,
            reads_cache=self.reads_cache,
        )
        child.prompt_len = self.prompt_len
        child.num_computed_tokens = self.num_computed_tokens
        return child

    def append(self, token_id: int) -> None:
        """Add a sampled token. Its own keys and values are computed by the next step.

        It replaces a pending token.
        """
        if self.token_ids[-1] < 0:
            self.token_ids[-1] = token_id
        else:
            self.token_ids.append(token_id)

    def append_pending(self, row: int) -> None:
        """Add the token that is being sampled from this row of logits, whose id is not known."""
        self.token_ids.append(-1 - row)

    def mark_computed(self, num_new_tokens: int) -> None:
        """Record that `num_new_tokens` more tokens are computed, or shared with a parent."""
        self.num_computed_tokens += num_new_tokens
        assert self.num_computed_tokens <= len(self.token_ids), "more tokens computed than exist"

    def mark_cached(self, num_tokens: int) -> None:
        """Record on admission that the first `num_tokens` tokens are cached."""
        assert num_tokens < self.num_tokens, "the last token must be computed for its logits"
        self.num_computed_tokens = num_tokens
        if self.num_cached_tokens is None:
            self.num_cached_tokens = num_tokens

    def forget_computed(self) -> None:
        """Reset the computed tokens, after a preemption by recomputation (section 4.5)."""
        self.num_computed_tokens = 0

    def num_in_common(self, other: "Sequence") -> int:
        """Return how many first tokens are the same in both."""
        pairs = zip(self.token_ids, other.token_ids, strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(self.num_tokens, other.num_tokens)
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_begun_tokens(self) -> int:
        """The number of tokens that are computed or in flight."""
        return self.num_computed_tokens + self.num_in_flight

    @property
    def num_uncomputed_tokens(self) -> int:
        """The number of tokens that are neither computed nor in flight."""
        return len(self.token_ids) - self.num_computed_tokens - self.num_in_flight

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

    A group begins with one sequence. Once its prompt is computed, it forks into `width` of them,
    the number of samples or beams of the request. Finished sequences leave the list. If the group
    is recomputed after that, all but the first are awaiting refork. Only the scheduler writes to
    the fields of a group.
    """

    request_id: str
    sequences: list[Sequence]  # unfinished ones, in the order they joined
    width: int = 1
    awaiting_refork: list[Sequence] = field(default_factory=list[Sequence])
    status: SequenceStatus = SequenceStatus.WAITING
    arrival: int = 0  # the scheduler's running number, set when the group is added
    num_preemptions: int = 0

    @property
    def num_batch_slots(self) -> int:
        """The maximum number of its sequences in a step: before its fork, `width`."""
        has_yet_to_fork = self.sequences[0].num_output_tokens == 0  # the first token forks it
        return self.width if has_yet_to_fork else len(self.sequences) + len(self.awaiting_refork)

    @property
    def is_decoding(self) -> bool:
        """Whether every sequence has one token left to compute, and then samples the next."""
        for seq in self.sequences:  # all(...) would take twice as long, per group and step
            if len(seq.token_ids) - seq.num_computed_tokens - seq.num_in_flight != 1:
                return False
        return not self.awaiting_refork

    def __repr__(self) -> str:
        return f"SequenceGroup({self.request_id!r}, {self.status.name}, {self.sequences})"
