"""Lab 5: classic mistakes, each with the task that it must cost points; and unusual right ones."""

BEGINNING = """
from minipaged.memory.block_manager import BlockManager as Library
from minipaged.engine.sampling_request import SamplingRequest as LibraryRequest
from minipaged.sampling.rows import SamplingRow
"""

WRONG = {
    "forks_without_counting": (
        1,
        """
class BlockManager(Library):
    def fork(self, parent, child):
        table = self._tables[parent.seq_id].beginning(child.num_computed_tokens)
        self._tables[child.seq_id] = table
        if parent.seq_id in self._swapped:
            self._swapped.add(child.seq_id)
""",
    ),
    "shares_the_table_itself": (
        1,
        """
class BlockManager(Library):
    def fork(self, parent, child):
        table = self._tables[child.seq_id] = self._tables[parent.seq_id]
        for block in table.blocks:
            self._pool_of(parent).share(block)
        if parent.seq_id in self._swapped:
            self._swapped.add(child.seq_id)
""",
    ),
    "copies_when_it_forks": (
        1,
        """
class BlockManager(Library):
    def fork(self, parent, child):
        table = self._tables[parent.seq_id].beginning(child.num_computed_tokens)
        pool = self._pool_of(parent)
        table.blocks = [pool.allocate() for _ in table.blocks]
        self._tables[child.seq_id] = table
        if parent.seq_id in self._swapped:
            self._swapped.add(child.seq_id)
""",
    ),
    "shares_what_the_child_has_not_computed": (
        1,
        """
class BlockManager(Library):
    def fork(self, parent, child):
        super().fork(parent, parent.fork(child.seq_id))
""",
    ),
    "shares_swapped_blocks_in_the_wrong_pool": (
        1,
        """
class BlockManager(Library):
    def fork(self, parent, child):
        table = self._tables[parent.seq_id].beginning(child.num_computed_tokens)
        for block in table.blocks:
            self._pool.share(block)
        self._tables[child.seq_id] = table
""",
    ),
    "leaks_what_is_shared": (
        2,
        """
class BlockManager(Library):
    def free(self, seq):
        pool = self._pool_of(seq)
        for block in reversed(self._tables.pop(seq.seq_id).blocks):
            if pool.ref_count(block) == 1:
                pool.free(block)
        self._swapped.discard(seq.seq_id)
        self._pinned.discard(seq.seq_id)
""",
    ),
    "frees_for_all_owners": (
        2,
        """
class BlockManager(Library):
    def free(self, seq):
        pool = self._pool_of(seq)
        for block in reversed(self._tables.pop(seq.seq_id).blocks):
            while pool.ref_count(block):
                pool.free(block)
        self._swapped.discard(seq.seq_id)
        self._pinned.discard(seq.seq_id)
""",
    ),
    "leaks_the_last_block": (
        2,
        """
class BlockManager(Library):
    def free(self, seq):
        self._tables[seq.seq_id].blocks.pop()
        super().free(seq)
""",
    ),
    "lets_parents_go_before_children": (
        2,
        """
class BlockManager(Library):
    def free(self, seq):
        self._tables[seq.seq_id].blocks.reverse()
        super().free(seq)
""",
    ),
    "forgets_that_it_was_swapped": (
        2,
        """
class BlockManager(Library):
    def free(self, seq):
        was_swapped = seq.seq_id in self._swapped
        super().free(seq)
        if was_swapped:
            self._swapped.add(seq.seq_id)
""",
    ),
    "keeps_the_prefix_pinned": (
        2,
        """
class BlockManager(Library):
    def free(self, seq):
        was_pinned = seq.seq_id in self._pinned
        super().free(seq)
        if was_pinned:
            self._pinned.add(seq.seq_id)
""",
    ),
    "forgets_the_copy": (
        3,
        """
class BlockManager(Library):
    def append(self, seq):
        table = self._tables[seq.seq_id]
        while len(table.blocks) * self.block_size < seq.num_tokens:
            table.blocks.append(self._pool.allocate())
        table.num_tokens = seq.num_tokens
        return []
""",
    ),
    "tells_nobody_of_the_copy": (
        3,
        """
class BlockManager(Library):
    def append(self, seq):
        super().append(seq)
        return []
""",
    ),
    "copies_the_wrong_way": (
        3,
        """
class BlockManager(Library):
    def append(self, seq):
        return [(new, old) for old, new in super().append(seq)]
""",
    ),
    "stays_an_owner_of_the_original": (
        3,
        """
class BlockManager(Library):
    def append(self, seq):
        pairs = super().append(seq)
        for original, _ in pairs:
            self._pool.share(original)
        return pairs
""",
    ),
    "the_last_writer_copies_too": (
        3,
        """
class BlockManager(Library):
    def fork(self, parent, child):
        super().fork(parent, child)
        self.shared = getattr(self, "shared", set()) | set(self._tables[child.seq_id].blocks)

    def append(self, seq):
        table = self._tables[seq.seq_id]
        first, pairs = seq.num_computed_tokens // self.block_size, []
        for logical in range(first, len(table.blocks)):
            old = table.blocks[logical]
            if old in getattr(self, "shared", ()):
                table.blocks[logical] = self._pool.allocate()
                self._pool.free(old)
                pairs.append((old, table.blocks[logical]))
        return pairs + super().append(seq)
""",
    ),
    "copies_all_that_is_shared": (
        3,
        """
class BlockManager(Library):
    def append(self, seq):
        table, pairs = self._tables[seq.seq_id], []
        for logical, block in enumerate(table.blocks):
            if self.ref_count(block) > 1:
                table.blocks[logical] = self._pool.allocate()
                self._pool.free(block)
                pairs.append((block, table.blocks[logical]))
        return pairs + super().append(seq)
""",
    ),
    "takes_a_block_in_advance": (
        3,
        """
class BlockManager(Library):
    def append(self, seq):
        pairs = super().append(seq)
        if seq.num_tokens % self.block_size == 0:
            self._tables[seq.seq_id].blocks.append(self._pool.allocate())
        return pairs
""",
    ),
    "believes_that_the_copy_is_known": (
        3,
        """
class BlockManager(Library):
    def append(self, seq):
        table = self._tables[seq.seq_id]
        known = table.num_cached_blocks
        pairs = super().append(seq)
        table.num_cached_blocks = known
        return pairs
""",
    ),
    "copies_what_was_found_in_the_cache": (
        3,
        """
class BlockManager(Library):
    def append(self, seq):
        # The scheduler marks cached tokens as computed only after admission.
        table = self._tables[seq.seq_id]
        table.num_tokens = min(table.num_tokens, seq.num_computed_tokens)
        return super().append(seq)
""",
    ),
    "all_samples_have_one_seed": (
        4,
        """
class SamplingRequest(LibraryRequest):
    def rows(self, seq):
        return [row._replace(seed=self._seed) for row in super().rows(seq)]
""",
    ),
    "samples_the_prompt_once": (
        4,
        """
class SamplingRequest(LibraryRequest):
    def rows(self, seq):
        return super().rows(seq)[:1]
""",
    ),
    "all_samples_get_the_first_token": (
        4,
        """
class SamplingRequest(LibraryRequest):
    def advance(self, sampled, fork):
        return super().advance({i: tokens[:1] * len(tokens) for i, tokens in sampled.items()}, fork)
""",
    ),
    "forks_after_the_token_was_added": (
        4,
        """
class SamplingRequest(LibraryRequest):
    def advance(self, sampled, fork):
        ended = []
        for seq_id, tokens in sampled.items():
            completion = sample = self._completions[seq_id]
            for number, token in enumerate(tokens):
                if number:
                    sample = self._add_completion(fork(completion.seq))
                sample.add(token)
                if sample.finish_reason is not None:
                    ended.append(sample.seq)
        return ended
""",
    ),
    "tells_of_the_first_sample_only": (
        4,
        """
class SamplingRequest(LibraryRequest):
    def advance(self, sampled, fork):
        ended = super().advance(sampled, fork)
        return [seq for seq in ended if seq is self._first]
""",
    ),
}

RIGHT = {
    "tables_made_anew_and_all_forks_first": """
class BlockManager(Library):
    def fork(self, parent, child):
        old, size = self._tables[parent.seq_id], self.block_size
        mine = [block for i, block in enumerate(old.blocks) if i * size < child.num_computed_tokens]
        known = min(old.num_cached_blocks, child.num_computed_tokens // size)
        self._tables[child.seq_id] = type(old)(size, mine, child.num_computed_tokens, known)
        if self.is_swapped(parent.seq_id):
            self._swapped.add(child.seq_id)
        for block in mine:
            self._pool_of(child).share(block)

    def free(self, seq):
        blocks, pool = self._tables[seq.seq_id].blocks, self._pool_of(seq)
        del self._tables[seq.seq_id]
        self._swapped -= {seq.seq_id}
        self._pinned -= {seq.seq_id}
        while blocks:
            pool.free(blocks.pop())

    def append(self, seq):
        table, size = self._tables[seq.seq_id], self.block_size
        written = range(table.num_tokens, seq.num_tokens)
        copies = {}
        for logical in sorted({position // size for position in written}):
            if logical >= len(table.blocks):
                table.blocks.extend([self._pool.allocate()])
                continue
            old = table.blocks[logical]
            if self.ref_count(old) > 1:
                copies[old] = self._pool.allocate()
        table.blocks = [copies.get(block, block) for block in table.blocks]
        for logical, block in enumerate(table.blocks):
            if block in copies.values():
                table.num_cached_blocks = min(logical, table.num_cached_blocks)
        for old in copies:
            self._pool.free(old)
        table.num_tokens = len(seq.token_ids)
        return list(copies.items())


class SamplingRequest(LibraryRequest):
    def rows(self, seq):
        ends = [*self._params.stop_ids]
        if not self._params.ignore_eos:
            ends += self._model.eos_token_ids
        seeds = [self._completions[seq.seq_id].row.seed]
        if not seq.output_token_ids:
            seeds = list(range(self._seed, self._seed + self._params.num_samples))
        said = seq.output_token_ids
        return [SamplingRow(self._params, seq.token_ids[: seq.prompt_len], said, s, ends)
                for s in seeds]

    def advance(self, sampled, fork):
        given = []
        for seq_id, tokens in sampled.items():
            parent = self._completions[seq_id]
            forks = [fork(parent.seq) for _ in range(1, len(tokens))]
            given += zip([parent, *map(self._add_completion, forks)], tokens)
        for sample, token in reversed(given):
            sample.add(token)
        return [sample.seq for sample, _ in given if sample.finish_reason is not None]
""",
}
