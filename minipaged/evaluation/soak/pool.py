"""One block manager with random operations, each checked against a model of the tensors."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from time import perf_counter_ns
from typing import Any

from minipaged.errors import OutOfBlocks
from minipaged.evaluation.soak.run import Mismatch
from minipaged.evaluation.soak.tensor_model import Blocks, TensorModel
from minipaged.memory import Memory
from minipaged.sequence import Sequence, SequenceGroup

BuildMemory = Callable[..., Memory]
SALTS = (None, None, None, "one", "another")
LONGEST_PROMPT = 96
TRY_A_REFUSAL = 1 / 32  # of refused calls are checked: a check copies the manager
WEIGHTS = {
    "admit": 12, "decode": 40, "compute": 8, "fork": 8, "free": 8, "recompute": 4, "refork": 3,
    "swap_out": 5, "swap_in": 7, "pin": 1, "unpin": 1,
}  # fmt: skip


class Pool:
    """A block manager of random size, and the sequences that share it."""

    def __init__(self, seed: str, build: BuildMemory) -> None:
        self.random = Random(seed)
        self.block_size = self.random.choice((1, 2, 3, 4, 8, 16))
        num_blocks = int(2 ** self.random.uniform(2, 9))
        num_swap_blocks = self.random.choice((0, num_blocks // 2, num_blocks))
        self.is_caching = self.random.random() < 0.75
        self.memory = build(
            num_blocks=num_blocks,
            block_size=self.block_size,
            num_swap_blocks=num_swap_blocks,
            watermark_blocks=0,
            enable_prefix_caching=self.is_caching,
        )
        self._model = TensorModel(self.memory)
        self.running: list[SequenceGroup] = []
        self.swapped: list[SequenceGroup] = []
        self.pinned: list[Sequence] = []
        self.nanoseconds = 0  # time spent in the manager
        self._next_id = 0
        # Some pools are crowded, others mostly empty: each has its own probabilities.
        self._weights = [w * self.random.uniform(0.4, 2) for w in WEIGHTS.values()]
        self._operations = [getattr(self, f"_{name}") for name in WEIGHTS]

    def __str__(self) -> str:
        caching = "with" if self.is_caching else "without"
        return (
            f"a pool of {len(self._model.pool.owners)} blocks of {self.block_size} tokens, "
            f"{len(self._model.swap_pool.owners)} swap blocks, {caching} prefix caching"
        )

    def operate(self, count: int) -> Iterator[int]:
        """Do `count` random operations; yield the manager's nanoseconds after each.

        Raises Mismatch, or whatever the manager raises.
        """
        for _ in range(count):
            [operation] = self.random.choices(self._operations, self._weights)
            self.nanoseconds = 0
            operation()
            yield self.nanoseconds

    def drain(self) -> None:
        """Free everything: all blocks come back. Raises Mismatch."""
        for group in [*self.running, *self.swapped]:
            self._give_up(group)
        while self.pinned:
            self._release(self.pinned.pop())
        self.recount()
        if self.memory.num_free != self.memory.num_blocks or self.memory.tables:
            raise Mismatch(f"{self.memory.num_free} of {self.memory.num_blocks} blocks came back")

    # ---- operations ------------------------------------------------------------------------------

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        begin = perf_counter_ns()
        result = method(*arguments)
        self.nanoseconds += perf_counter_ns() - begin
        return result

    def _admit(self) -> None:
        seq = self._new_sequence(self._prompt())
        seq.reads_cache = self.random.random() < 0.9
        self._join(SequenceGroup(str(seq.seq_id), [seq]))

    def _prompt(self) -> list[int]:
        """Random tokens, or a prefix of another sequence followed by random tokens."""
        longest = min(LONGEST_PROMPT, max(2, len(self._model.pool.slots) // 3))
        tokens: list[int] = []
        groups = self.running or self.swapped
        if groups and self.random.random() < 0.6:
            other = self.random.choice(self.random.choice(groups).sequences)
            tokens = other.token_ids[: self.random.randint(1, other.num_tokens)]
        if not tokens or self.random.random() < 0.5:
            more = self.random.randint(1, longest)
            tokens = [*tokens, *self.random.choices((0, 1), k=more)][: max(longest, len(tokens))]
        return tokens

    def _new_sequence(self, tokens: list[int]) -> Sequence:
        self._next_id += 1
        seq = Sequence(self._next_id, tokens, cache_salt=self.random.choice(SALTS))
        self._model.add(seq)
        return seq

    def _join(self, group: SequenceGroup) -> None:
        """Admit a group if there is room; otherwise drop it."""
        memory, sequences = self.memory, group.sequences
        if not self._call(memory.can_admit, group, True):
            self._check_refusal(lambda apart: apart.admit(group))
            for seq in sequences:
                del self._model.held[seq.seq_id]
            return
        promised = self._call(memory.num_cached_tokens, sequences[0])
        num_cached, copies = self._call(memory.admit, group)
        if num_cached[0] != promised:
            raise Mismatch(f"{num_cached[0]} tokens were cached, but {promised} were promised")
        self._model.pool.copy(copies, self._model.pool)
        for seq, cached in zip(sequences, num_cached, strict=True):
            seq.mark_cached(cached)
            self._model.held[seq.seq_id].num_readable = cached
        self.running.append(group)
        self._model.settle(sequences)

    def _decode(self) -> None:
        """A step of one group: one more token per sequence, and its keys and values."""
        if not self.running:
            self._admit()
            return
        group = self.random.choice(self.running)
        for seq in group.sequences:
            if not seq.num_uncomputed_tokens:
                seq.append(self.random.getrandbits(1))
                self._model.extend(seq)
        if not self._call(self.memory.can_append, group):
            self._check_refusal(lambda apart: [apart.append(seq) for seq in group.sequences])
            self._give_up(group)
            return
        self._append(group)
        self._write(group, most=LONGEST_PROMPT)

    def _append(self, group: SequenceGroup) -> None:
        for seq in group.sequences:
            self._model.pool.copy(self._call(self.memory.append, seq), self._model.pool)
            if self.memory.tables[seq.seq_id].num_tokens != seq.num_tokens:
                raise Mismatch(f"append left tokens of {seq} without a slot")
        self._model.settle(group.sequences)

    def _compute(self) -> None:
        """A chunk of a prompt, if any is still to be computed."""
        if self.running:
            self._write(self.random.choice(self.running), self.random.randint(1, 16))

    def _write(self, group: SequenceGroup, most: int) -> None:
        """The model's part of a step: write uncomputed tokens to their slots."""
        for seq in group.sequences:
            stop = min(seq.num_tokens, seq.num_computed_tokens + most)
            self._model.write(seq, stop)
            seq.mark_computed(stop - seq.num_computed_tokens)
            self._call(self.memory.cache_blocks, seq)
        self._model.settle(group.sequences)

    def _fork(self) -> None:
        group = self.random.choice(self.running) if self.running else None
        if group is None or len(group.sequences) >= 4:
            return
        parent = self.random.choice(group.sequences)
        if parent.num_uncomputed_tokens == 0:
            self._next_id += 1
            self._fork_from(group, parent, parent.fork(self._next_id))

    def _fork_from(self, group: SequenceGroup, parent: Sequence, child: Sequence) -> None:
        self._model.add(child, child.num_computed_tokens)
        group.sequences.append(child)
        self._call(self.memory.fork, parent, child)
        self._model.settle([child])

    def _refork(self) -> None:
        """Recompute a sample like the scheduler: as a fork of another one, at a full block."""
        group = self.random.choice(self.running) if self.running else None
        if group is None or len(group.sequences) < 2:
            return
        child = group.sequences[-1]
        self._free_sequences(group, [child])
        child.forget_computed()
        parent = max(group.sequences, key=child.num_in_common)
        in_common = min(parent.num_in_common(child), parent.num_computed_tokens)
        child.mark_computed(in_common // self.block_size * self.block_size)
        self._fork_from(group, parent, child)
        if self._call(self.memory.can_append, group):
            self._append(group)
        else:
            self._free_sequences(group, [child])

    def _free(self) -> None:
        """A sequence of a group ends, running or swapped."""
        if groups := self.running + self.swapped:
            group = self.random.choice(groups)
            self._free_sequences(group, [self.random.choice(group.sequences)])

    def _give_up(self, group: SequenceGroup) -> None:
        self._free_sequences(group, list(group.sequences))

    def _free_sequences(self, group: SequenceGroup, sequences: list[Sequence]) -> None:
        for seq in sequences:
            self._release(seq)
            group.sequences.remove(seq)
        if not group.sequences:
            (self.running if group in self.running else self.swapped).remove(group)

    def _release(self, seq: Sequence) -> None:
        self._call(self.memory.free, seq)
        self._model.settle([seq])
        del self._model.held[seq.seq_id]

    def _recompute(self) -> None:
        """Preempt a group by recomputation, and readmit it if there is room."""
        if self.running:
            group = self.random.choice(self.running)
            sequences = list(group.sequences)
            self._give_up(group)
            for seq in sequences:
                seq.forget_computed()
                self._model.add(seq)
            group.sequences = sequences
            self._join(group)

    def _swap_out(self) -> None:
        group = self.random.choice(self.running) if self.running else None
        if group is not None and self._call(self.memory.can_swap_out, group):
            self._model.swap_pool.copy(self._call(self.memory.swap_out, group), self._model.pool)
            self._move(group, self.running, self.swapped, self._model.swap_pool)

    def _swap_in(self) -> None:
        group = self.random.choice(self.swapped) if self.swapped else None
        if group is None:
            return
        if self._call(self.memory.can_admit, group, True):
            self._model.pool.copy(self._call(self.memory.swap_in, group), self._model.swap_pool)
            self._move(group, self.swapped, self.running, self._model.pool)
            self._append(group)
        else:
            self._check_refusal(
                lambda apart: (apart.swap_in(group), [apart.append(s) for s in group.sequences])
            )

    def _move(
        self,
        group: SequenceGroup,
        source: list[SequenceGroup],
        target: list[SequenceGroup],
        home: Blocks,
    ) -> None:
        source.remove(group)
        target.append(group)
        self._model.settle(group.sequences, home)

    def _pin(self) -> None:
        seq = self._new_sequence(self._prompt())
        held = self._model.held[seq.seq_id]
        held.num_readable = self._call(self.memory.pin, seq)
        self.pinned.append(seq)
        self._model.settle([seq])

    def _unpin(self) -> None:
        if self.pinned:
            self._release(self.pinned.pop(self.random.randrange(len(self.pinned))))

    # ---- checks ----------------------------------------------------------------------------------

    def _check_refusal(self, refused: Callable[[Memory], Any]) -> None:
        """Check occasionally that a refused call is really impossible."""
        if self.random.random() < TRY_A_REFUSAL:
            try:
                refused(deepcopy(self.memory))
            except OutOfBlocks:
                return
            raise Mismatch("the manager refuses an operation for which it has room")

    def recount(self) -> None:
        """Compare everything with the model. Raises Mismatch or CheckFailed."""
        self._model.recount()
        self._check_fits()

    def _check_fits(self) -> None:
        """A group fits if and only if there is room for it once all others have left."""
        if self.running:
            group, alone = self.random.choice(self.running), deepcopy(self.memory)
            for other in self.running + self.swapped:
                for seq in other.sequences if other is not group else ():
                    alone.free(seq)
            if alone.can_append(group) != self.memory.fits(group):
                raise Mismatch(f"fits returns {self.memory.fits(group)} for {group}, wrongly")
