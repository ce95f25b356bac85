"""From decisions to tensors: positions, slots, block tables, and the cache they index."""

import dataclasses
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.attention.backend import BACKENDS
from minipaged.attention.batch import BatchBuilder
from minipaged.attention.device_batch import DeviceBatchBuilder
from minipaged.attention.kv_cache import KVCache, bytes_per_block, choose_kv_dtype
from minipaged.config import ModelConfig
from minipaged.errors import InvalidOption
from minipaged.memory import BlockTable
from minipaged.scheduler.output import SequenceInput, StepInput
from minipaged.utils.device import GIB, choose_device, to_device_together
from minipaged.worker.cache_size import blocks_that_fit, physical_memory, refuse_more_than_memory
from minipaged.worker.model_runner import ModelRunner

CONFIG = ModelConfig(
    architecture="Toy",
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    hidden_size=12,
    vocab_size=50,
    max_position_embeddings=64,
)


def query(
    seq_id: int, tokens: list[int], context_len: int, blocks: list[int], **more
) -> SequenceInput:
    return SequenceInput(seq_id, tokens, context_len, blocks, **more)


@pytest.mark.parametrize("before", [[], [1, 2], [1, 2, 3]])
def test_a_step_with_a_sequence_twice_or_too_many_is_refused(before):
    builder = BatchBuilder(max_num_seqs=3, max_blocks_per_seq=8, block_size=4)
    if before:
        builder.build([query(seq_id, [5], 0, [seq_id]) for seq_id in before])
    for seq_ids, fault in (
        ([1, 1], "a sequence is in the step twice"),
        ([1, 2, 3, 1], "a sequence is in the step twice"),
        ([1, 2, 3, 4], "more than max_num_seqs sequences"),
    ):
        with pytest.raises(AssertionError, match=fault):
            builder.build([query(seq_id, [5], 0, [seq_id]) for seq_id in seq_ids])


def test_the_example_in_the_docstring_is_what_is_built():
    builder = BatchBuilder(max_num_seqs=4, max_blocks_per_seq=8, block_size=4)
    batch = builder.build([query(0, [5], 5, [3, 7]), query(1, [10, 11, 12], 0, [2])])
    assert batch.token_ids.tolist() == [5, 10, 11, 12]
    assert batch.positions.tolist() == [5, 0, 1, 2]
    assert batch.slot_mapping.tolist() == [29, 8, 9, 10]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4]
    assert batch.context_lens.tolist() == [5, 0]
    assert batch.block_tables[0].tolist() == [3, 7]
    assert batch.block_tables[1, 0] == 2
    assert batch.logit_rows.tolist() == [0, 3]
    assert [(s.start, s.stop, s.context_len, s.seq_len) for s in batch.spans] == [
        (0, 1, 5, 6),
        (1, 4, 0, 3),
    ]


def test_logits_are_computed_only_for_the_last_tokens_asked_for():
    builder = BatchBuilder(4, 8, 4)
    batch = builder.build(
        [
            query(0, [1, 2, 3], 0, [0], num_logits=0),
            query(1, [4, 5, 6], 0, [1], num_logits=3),
            query(2, [7, 8], 0, [2], num_logits=1),
        ]
    )
    assert batch.logit_rows.tolist() == [3, 4, 5, 7]


class OnDevice(DeviceBatchBuilder):
    """The builder for a GPU, with tensors of its own on the CPU."""

    def __init__(self, max_num_seqs: int, max_blocks_per_seq: int, block_size: int) -> None:
        super().__init__(max_num_seqs, max_blocks_per_seq, block_size, "cpu")


@pytest.mark.parametrize("builder", [BatchBuilder, OnDevice])
@given(data=st.data())
def test_every_token_gets_the_slot_of_its_block_table(builder, data):
    """Over many steps of sequences that begin, grow, move, skip steps and end."""
    block_size = data.draw(st.integers(1, 5))
    builder = builder(max_num_seqs=3, max_blocks_per_seq=40, block_size=block_size)
    lengths: dict[int, int] = {}
    tables: dict[int, BlockTable] = {}
    next_id = 0
    for _ in range(data.draw(st.integers(1, 12))):
        for seq_id in list(lengths):
            if data.draw(st.booleans()) and data.draw(st.booleans()):
                del lengths[seq_id], tables[seq_id]
        while len(lengths) < 3 and data.draw(st.booleans()):
            lengths[next_id] = 0
            tables[next_id] = BlockTable(block_size, [], 0)
            next_id += 1
        queries = []
        for seq_id, table in tables.items():
            if data.draw(st.integers(0, 3)) == 0:
                continue  # does not run in this step
            new = data.draw(st.integers(1, 6))
            total = lengths[seq_id] + new
            while len(table) * block_size < total:
                table.blocks.append(data.draw(st.integers(0, 99)))
            if data.draw(st.integers(0, 4)) == 0:  # copied on write, or swapped out and in
                index = data.draw(st.integers(0, len(table) - 1))
                table.blocks[index] = data.draw(st.integers(0, 99))
            table.num_tokens = total
            queries.append(SequenceInput(seq_id, list(range(new)), lengths[seq_id], table.blocks))
            lengths[seq_id] = total
        if not queries:
            continue
        batch = builder.build(queries)
        expected = [
            tables[q.seq_id].slot(position)
            for q in queries
            for position in range(q.context_len, q.context_len + len(q.token_ids))
        ]
        assert batch.slot_mapping.tolist() == expected
        for q, row in zip(queries, batch.block_tables, strict=True):
            assert row[: len(q.block_table)].tolist() == q.block_table[: len(row)]


def test_a_table_row_is_rewritten_only_where_it_changed():
    builder = BatchBuilder(2, 8, 4)
    builder.build([query(0, [1] * 8, 0, [3, 7])])
    row = builder._tables[builder._rows[0]]
    row[0] = 99  # a mark, which writing the row again would erase
    builder.build([query(0, [1], 8, [3, 7, 5])])
    assert row[:3].tolist() == [99, 7, 5]


def test_only_changed_entries_are_sent_to_a_device():
    builder = OnDevice(2, 8, 4)
    changed = []
    for tables in ([3, 7], [2]), ([3, 7], [2]), ([3, 7, 5], [2]), ([3, 7, 5], [6, 4]):
        steps = [query(i, [1], 4 * len(blocks) - 1, blocks) for i, blocks in enumerate(tables)]
        host = builder.lay_out(steps)
        arrays = builder.arrays(host)
        changed.append(sorted(zip(arrays[5].tolist(), arrays[-1].tolist(), strict=True)))
        batch = builder.send(host)
        got = zip(batch.block_tables.tolist(), tables, strict=True)
        assert [row[: len(blocks)] for row, blocks in got] == list(tables)
    of_first, of_second = (8 * builder._rows[seq_id] for seq_id in (0, 1))
    assert changed == [
        sorted([(of_first, 3), (of_first + 1, 7), (of_second, 2)]),
        [],
        [(of_first + 2, 5)],
        [(of_second, 6), (of_second + 1, 4)],
    ]


def test_entries_of_a_step_that_was_interrupted_are_sent_with_the_next():
    builder = OnDevice(2, 8, 4)
    builder.build([query(0, [1], 3, [3])])
    builder.lay_out([query(0, [1], 4, [3, 7])])  # the step ends here
    batch = builder.build([query(0, [1], 5, [3, 7])])
    assert batch.block_tables.tolist() == [[3, 7]]


def test_an_entry_is_sent_even_if_writing_it_was_interrupted(monkeypatch):
    builder = OnDevice(2, 8, 4)
    builder.build([query(0, [1], 3, [3])])
    write = BatchBuilder._write

    def interrupted(*args):
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BatchBuilder, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            builder.build([query(0, [1], 4, [3, 7])])
    batch = builder.build([query(0, [1], 4, [3, 7])])
    assert batch.block_tables.tolist() == [[3, 7]]


def test_all_numbers_of_a_step_are_sent_in_one_copy(monkeypatch):
    copied = []
    monkeypatch.setattr(
        "minipaged.attention.device_batch.to_device_together",
        lambda *args: copied.append(len(args[0])) or to_device_together(*args),
    )
    builder = OnDevice(4, 8, 4)
    steps = [query(0, [5], 5, [3, 7]), query(1, [10, 11, 12], 0, [2])]
    for _ in range(2):
        batch = builder.build(steps)
    assert copied == [9, 9]
    expected = BatchBuilder(4, 8, 4).build(steps)
    for field in dataclasses.fields(expected):
        sent, value = getattr(batch, field.name), getattr(expected, field.name)
        assert sent.dtype == value.dtype
        assert sent.tolist() == value.tolist()


def test_a_block_table_that_is_too_short_is_refused():
    builder = BatchBuilder(2, 8, 4)
    builder.build([query(0, [1], 4, [3, 7])])
    with pytest.raises(AssertionError, match="a block table is too short"):
        builder.build([query(0, [1], 8, [3, 7])])


def test_rows_of_finished_sequences_are_reused():
    builder = BatchBuilder(max_num_seqs=2, max_blocks_per_seq=4, block_size=4)
    for step in range(10):
        batch = builder.build([query(2 * step, [1], 0, [step]), query(2 * step + 1, [1], 0, [9])])
        assert batch.block_tables[:, 0].tolist() == [step, 9]


@pytest.mark.parametrize(
    ("context_len", "num_new", "begun"),
    [
        (0, 3, [5]),  # a prompt within a block
        (0, 4, []),  # it fills the block: nothing of the former owner remains
        (0, 6, [2]),  # its first block is filled, its second is not
        (4, 1, [2]),  # a decode whose token opens a block
        (5, 1, []),  # one whose block was begun, and cleared, before
        (3, 1, []),
        (2, 3, [2]),  # a chunk that fills one block and begins the next
        (6, 1, []),
    ],
)
def test_a_block_is_new_in_the_step_that_writes_its_first_slot(context_len, num_new, begun):
    step = query(0, [1] * num_new, context_len, [5, 2, 9])
    assert BatchBuilder(1, 8, 4).lay_out([step]).begun_blocks == begun


@given(st.integers(1, 5), st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_every_slot_after_the_end_of_a_sequence_has_been_cleared(block_size, chunks):
    """However a sequence grows, no other sequence's data follows its end in its last block."""
    blocks = list(range(50))
    stale = dict.fromkeys(blocks, True)
    length, builder = 0, BatchBuilder(1, 50, block_size)
    for num_new in chunks:
        step = builder.lay_out([query(0, [1] * num_new, length, blocks)])
        for block in step.begun_blocks:
            stale[block] = False
        length += num_new
        assert length % block_size == 0 or not stale[length // block_size]


# ---- the cache -----------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_block_takes_memory_only_once_it_is_written():
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    before = resident()
    cache = KVCache(CONFIG, 200_000, 16, num_swap_blocks=200_000)
    size = 2 * 200_000 * bytes_per_block(CONFIG, 16, torch.float32)
    assert size > 200e6
    assert resident() - before < size / 10
    assert not cache.layers[0][0][::1000].any()
    cache.layers[0][0].fill_(1.0)
    assert resident() - before > size / 16


def test_a_forked_process_has_its_own_cache():
    cache = KVCache(CONFIG, 4, 2)
    child = os.fork()
    if child == 0:
        cache.layers[0][0].fill_(7.0)
        os._exit(0)
    os.waitpid(child, 0)
    assert not cache.layers[0][0].any()


def test_a_failed_memory_allocation_is_explained_in_a_sentence(monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("minipaged.attention.pool.mmap.mmap", refuse)
    with pytest.raises(InvalidOption, match=r"cannot allocate 0.0 GiB .*: lower num_blocks"):
        KVCache(CONFIG, 4, 2)


def numbered_cache(**options) -> KVCache:
    cache = KVCache(CONFIG, 4, 2, num_swap_blocks=3, **options)
    for layer, (k, v) in enumerate(cache.layers):
        for block in range(4):
            k[block] = 100 * layer + block
            v[block] = 1000 + 100 * layer + block
    return cache


def blocks_of(pool: torch.Tensor) -> list[float]:
    assert all(len(block.unique()) == 1 for block in pool)
    return [block.unique().item() for block in pool]


def test_a_new_cache_is_zero_and_has_one_pool_per_layer():
    cache = KVCache(CONFIG, 4, 2, num_swap_blocks=3, dtype=torch.bfloat16)
    assert len(cache.layers) == 2
    for k, v in cache.layers:
        assert k.shape == v.shape == (4, 2, 2, 3)
        assert k.dtype is torch.bfloat16
        assert not k.any()
        assert not v.any()


def test_blocks_are_copied_in_every_layer_keys_and_values():
    cache = numbered_cache()
    cache.copy([(1, 3), (0, 2)])
    for layer, (k, v) in enumerate(cache.layers):
        assert blocks_of(k) == [100 * layer + b for b in (0, 1, 0, 1)]
        assert blocks_of(v) == [1000 + 100 * layer + b for b in (0, 1, 0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_a_cleared_block_is_zero_in_every_layer_and_no_other_is(dtype):
    cache = KVCache(CONFIG, 4, 2, dtype=dtype)
    for pool in (pool for layer in cache.layers for pool in layer):
        for tensor in [pool] if isinstance(pool, torch.Tensor) else [pool.numbers, pool.scales]:
            tensor.copy_(torch.ones(tensor.shape))
    cache.clear([2, 0])
    for k, v in cache.layers:
        assert [pool[block].abs().max() for pool in (k, v) for block in range(4)] == [0, 1] * 4


def test_a_copy_of_a_copy_is_refused():
    # On a GPU all pairs are copied at once: block 2 would hold what 1 held before, or after.
    with pytest.raises(AssertionError, match="a copy of a copy"):
        numbered_cache().copy([(0, 1), (1, 2)])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_8_bit_blocks_are_copied_and_swapped_with_their_scales(dtype: torch.dtype):
    cache = KVCache(CONFIG, 4, 2, num_swap_blocks=3, dtype=dtype)
    keys = torch.randn(4, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    for layer, (k, v) in enumerate(cache.layers):
        k[torch.arange(4)] = keys * 10**layer
        v[torch.arange(4)] = -keys
    cache.swap_out([(1, 2), (3, 0)])
    cache.copy([(0, 1)])
    cache.swap_in([(2, 3), (0, 2)])
    for layer, (k, v) in enumerate(cache.layers):
        moved = keys[[0, 0, 3, 1]]  # what blocks 0 to 3 hold now
        torch.testing.assert_close(k[torch.arange(4)], moved * 10**layer, rtol=0.07, atol=0.02)
        torch.testing.assert_close(v[torch.arange(4)], -moved, rtol=0.07, atol=0.02)


def test_8_bits_hold_nearly_twice_the_tokens_of_16():
    llama_3_8b = ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_size=4096,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    half = bytes_per_block(llama_3_8b, 16, torch.bfloat16)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        eight = bytes_per_block(llama_3_8b, 16, dtype)
        assert half / eight == pytest.approx(256 / 132)  # 128 numbers and a scale of 4 bytes
        cache = KVCache(CONFIG, 5, 4, dtype=dtype)
        held = sum(
            t.numel() * t.itemsize for kv in cache.layers for p in kv for t in vars(p).values()
        )
        assert held == 5 * bytes_per_block(CONFIG, 4, dtype)


def test_a_kv_dtype_is_chosen_by_name():
    assert choose_kv_dtype("auto", torch.bfloat16) is torch.bfloat16
    assert choose_kv_dtype("int8", torch.bfloat16) is torch.int8
    with pytest.raises(InvalidOption, match="kv_cache_dtype is 'int4'"):
        choose_kv_dtype("int4", torch.bfloat16)


def test_what_is_swapped_out_comes_back_into_other_blocks():
    cache = numbered_cache()
    cache.swap_out([(1, 2), (3, 0)])
    for k, v in cache.layers:
        k.fill_(-1)
        v.fill_(-1)
    cache.swap_in([(2, 0), (0, 1)])
    for layer, (k, v) in enumerate(cache.layers):
        assert blocks_of(k) == [100 * layer + 1, 100 * layer + 3, -1, -1]
        assert blocks_of(v) == [1000 + 100 * layer + 1, 1000 + 100 * layer + 3, -1, -1]


def test_the_bytes_of_a_token_are_those_of_the_papers_example():
    opt_13b = ModelConfig(
        architecture="OPTForCausalLM",
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        head_dim=128,
        hidden_size=5120,
        vocab_size=50272,
        max_position_embeddings=2048,
    )
    assert opt_13b.kv_bytes_per_token(2) == 819_200  # section 3: 800 KB


def test_a_pool_too_small_for_one_block_is_refused():
    cpu = torch.device("cpu")
    assert blocks_that_fit(1000, cpu, 0.9) > 1000
    with pytest.raises(InvalidOption, match="a block of keys and values takes"):
        blocks_that_fit(10**15, cpu, 0.9)


def test_a_pool_larger_than_the_memory_is_refused_with_the_largest_that_fits():
    room = physical_memory() // 1000
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    refuse_more_than_memory(room // 2, room // 2, 1000, cpu)
    refuse_more_than_memory(room * 3, room, 1000, cuda)  # there the pool is not in host memory
    for blocks, swap_blocks, device in [(room, 1, cpu), (1, room + 1, cuda)]:
        with pytest.raises(InvalidOption, match=f"Give at most {room} in all"):
            refuse_more_than_memory(blocks, swap_blocks, 1000, device)


def runner(model, cache) -> ModelRunner:
    return ModelRunner(model, BACKENDS["reference"], cache, BatchBuilder(1, 4, 2))


def test_a_step_swaps_out_then_in_then_copies_then_clears_and_then_runs():
    """Each operation reads what the one before has written."""
    cache = numbered_cache()
    seen = []

    class Model:
        config, dtype = CONFIG, torch.float32

        def __call__(self, token_ids, positions, kv_cache, batch):
            seen.append([blocks_of(k) for k, _ in kv_cache.layers])
            return torch.zeros(len(token_ids), 12)

        def logits(self, hidden):
            return torch.zeros(len(hidden), 50)

    step = StepInput(
        (query(0, [5], 0, [0]),), swap_out=[(1, 0), (0, 1)], swap_in=[(0, 2)], copies=[(2, 3)]
    )
    logits = runner(Model(), cache).run(step)
    assert logits.shape == (1, 50)
    # Block 0, which the sequence begins, is zero. Its former content is in the swap pool.
    assert seen == [[[0, 1, 1, 1], [0, 101, 101, 101]]]
    cache.swap_in([(1, 0)])
    assert [blocks_of(k)[0] for k, _ in cache.layers] == [0, 100]


def test_a_step_without_tokens_still_moves_its_blocks():
    cache = numbered_cache()

    class Model:
        config, dtype = CONFIG, torch.float32

    logits = runner(Model(), cache).run(StepInput((), copies=[(1, 3)]))
    assert logits.shape == (0, 50)
    assert blocks_of(cache.layers[0][0]) == [0, 1, 2, 1]


def test_a_pending_token_is_what_its_row_of_the_step_before_sampled():
    seen = []

    class Model:
        config, dtype = CONFIG, torch.float32

        def __call__(self, token_ids, positions, kv_cache, batch):
            seen.append(token_ids.tolist())
            assert batch.token_ids is token_ids
            return torch.zeros(len(token_ids), 12)

        def logits(self, hidden):
            return torch.zeros(len(hidden), 50)

    batches = BatchBuilder(3, 4, 2)
    pending = ModelRunner(Model(), BACKENDS["reference"], numbered_cache(), batches)
    step = StepInput((query(0, [-2], 3, [0, 1]), query(1, [0, 9], 0, [2]), query(2, [-1], 1, [3])))
    sampled = torch.tensor([41, 42])
    assert pending.run(step, sampled).shape == (3, 50)
    assert seen == [[42, 0, 9, 41]]
    assert sampled.tolist() == [41, 42]


def test_slot_numbers_of_a_huge_pool_do_not_overflow():
    batch = BatchBuilder(1, 8, 4).build([query(0, [1], 0, [2**30])])
    assert batch.slot_mapping.tolist() == [2**32]


def test_the_model_runs_without_autograd():
    class Model:
        config, dtype = CONFIG, torch.float32

        def __call__(self, token_ids, positions, kv_cache, batch):
            assert torch.is_inference_mode_enabled()
            return torch.zeros(len(token_ids), 12)

        def logits(self, hidden):
            return hidden

    step = StepInput((query(0, [5], 0, [0]),))
    assert runner(Model(), numbered_cache()).run(step).is_inference()


def test_the_message_to_the_device_side_can_be_sent_to_another_process():
    step = StepInput((query(3, [5, 6], 9, [4, 1, 7], num_logits=2),), copies=((2, 1),))
    assert pickle.loads(pickle.dumps(step)) == step


def test_on_a_cpu_the_pool_takes_an_eighth_of_the_memory_and_2_gib_at_most(monkeypatch):
    for memory, blocks in [(8 * GIB, 1), (100 * GIB, 2)]:
        monkeypatch.setattr("minipaged.worker.cache_size.physical_memory", lambda m=memory: m)
        assert blocks_that_fit(GIB, torch.device("cpu"), 0.9) == blocks


def test_devices_are_chosen_by_name():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InvalidOption, match="there is no device 'abacus'"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidOption, match="needs a CUDA GPU"):
            choose_device("cuda")
