"""Decode steps that are recorded once and replayed: the same tokens, and no other memory written.

A CUDA graph needs a GPU (see test_gpu.py). Everything around it does not: here a step is "recorded"
by keeping the function, which on every replay finds its inputs in the same tensors as a graph
would, padding included.
"""

import dataclasses

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from graphs_on_a_cpu import with_graphs
from torch import Tensor

from minipaged import LLM, Parts, SamplingParams
from minipaged.attention import reference
from minipaged.attention.triton.splits import most_splits, splits_to_fill
from minipaged.scheduler.output import SequenceInput, StepInput
from minipaged.worker import cuda_graphs as graphs
from minipaged.worker.cuda_graphs import Step, sizes_to_record

pytestmark = pytest.mark.filterwarnings("ignore:no GPU")

PROMPTS = [[(7 * i + 11 * n) % (VOCAB_SIZE - 3) + 3 for i in range(n)] for n in (5, 9, 2)]
# They end one after the other, so that batches of 3, 2 and 1 are met.
PARAMS = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (7, 5, 3)]
OPTIONS = {"block_size": 4, "num_blocks": 24, "max_model_len": 24, "max_num_seqs": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


class Recorder:
    """Keeps the steps, and notes the size and bound of each that is recorded or replayed."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, int]] = []
        self.replayed: list[tuple[int, int]] = []

    def __call__(self, step: Step) -> Step:
        inputs, longest = step.args
        kind = inputs.batch(longest).num_seqs, longest
        self.recorded.append(kind)

        def replay() -> None:
            self.replayed.append(kind)
            step()

        return replay


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(list(PROMPTS), PARAMS, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_replayed_steps_give_the_same_tokens_and_the_same_cache(folder):
    plain = LLM(folder, attention_backend="triton", **OPTIONS)
    expected = tokens(plain)
    recorder = Recorder()
    llm = with_graphs(LLM(folder, attention_backend="triton", **OPTIONS), recorder)
    assert tokens(llm) == expected == tokens(LLM(folder, attention_backend="reference", **OPTIONS))
    # 3 sequences are padded to 4; 2 and 1 are sizes of their own.
    assert recorder.replayed == [(4, 24)] * 2 + [(2, 24)] * 2 + [(1, 24)] * 2
    for (k, v), (plain_k, plain_v) in zip(
        llm.engine.executor.runner.kv_cache.layers,
        plain.engine.executor.runner.kv_cache.layers,
        strict=True,
    ):
        torch.testing.assert_close(k, plain_k)
        torch.testing.assert_close(v, plain_v)


def test_all_steps_are_recorded_at_the_start_the_largest_first(folder, monkeypatch):
    monkeypatch.setattr(graphs, "lengths_to_record", lambda longest: [12, longest])
    recorder = Recorder()
    llm = LLM(folder, attention_backend="triton", **OPTIONS)
    cache = [pool.clone() for pool in llm.engine.executor.runner.kv_cache._pool]
    llm = with_graphs(llm, recorder)
    everything = [(size, longest) for size in (6, 4, 2, 1) for longest in (24, 12)]
    assert recorder.recorded == everything
    assert not recorder.replayed
    runner = llm.engine.executor.runner  # recording writes no keys and values
    assert all(map(torch.equal, cache, runner.kv_cache._pool))
    tokens(llm)
    assert recorder.recorded == everything


def test_all_sizes_write_their_results_to_one_buffer(folder):
    llm = with_graphs(LLM(folder, attention_backend="triton", **OPTIONS))
    decodes = llm.engine.executor.runner.graphs
    assert decodes._hidden.shape == (6, 48)
    before = decodes._hidden.data_ptr()
    tokens(llm)
    assert decodes._hidden.data_ptr() == before


def test_a_batch_larger_than_all_graphs_is_not_replayed(folder, monkeypatch):
    expected = tokens(LLM(folder, attention_backend="triton", **OPTIONS))
    monkeypatch.setattr(graphs, "MOST_SEQUENCES", 2)
    recorder = Recorder()
    llm = with_graphs(LLM(folder, attention_backend="triton", **OPTIONS), recorder)
    assert tokens(llm) == expected
    assert recorder.replayed == [(2, 24)] * 2 + [(1, 24)] * 2  # 3 sequences were not


def test_a_long_recording_shows_its_progress(folder, monkeypatch, capsys):
    monkeypatch.setattr(graphs, "SECONDS_WITHOUT_PROGRESS", 0.0)
    llm = with_graphs(LLM(folder, attention_backend="triton", **OPTIONS))
    assert "Recording: 100%" in capsys.readouterr().err
    llm.engine.executor.runner.record_graphs(shows_progress=False)
    assert not capsys.readouterr().err


def test_a_replay_reads_its_inputs_at_the_same_addresses(folder):
    addresses: dict[int, list[list[int]]] = {}

    def record(step: Step) -> Step:
        inputs, longest = step.args
        assert longest == OPTIONS["max_model_len"]  # no number of the step it was made in

        def replay() -> None:
            batch = inputs.batch(longest)
            of_size = addresses.setdefault(batch.num_seqs, [])
            fields = (getattr(batch, f.name) for f in dataclasses.fields(batch))
            tensors = [f for f in fields if isinstance(f, Tensor) and f is not batch.block_tables]
            of_size.append([tensor.data_ptr() for tensor in tensors])
            step()

        return replay

    llm = with_graphs(LLM(folder, attention_backend="triton", **OPTIONS), record)
    tokens(llm)
    tokens(llm)
    assert addresses.keys() == {1, 2, 4}
    for of_size in addresses.values():
        assert len(of_size) > 1
        assert all(each == of_size[0] for each in of_size)


def test_a_replayed_step_reads_pending_tokens_from_the_device(folder):
    seen: list[list[int]] = []

    def record(step: Step) -> Step:
        inputs, longest = step.args

        def replay() -> None:
            seen.append(inputs.batch(longest).token_ids.tolist())
            step()

        return replay

    llm = with_graphs(LLM(folder, attention_backend="triton", **OPTIONS), record)
    runner = llm.engine.executor.runner
    one, other = SequenceInput(0, [-2], 5, [3, 7]), SequenceInput(1, [8], 2, [5])
    steps = [StepInput((one._replace(token_ids=[token]), other)) for token in (9, -2, 11)]
    expected = runner.run(steps[0])
    sampled = torch.tensor([11, 9])
    torch.testing.assert_close(runner.run(steps[1], sampled), expected)
    runner.run(steps[2])
    assert seen == [[9, 8], [9, 8], [11, 8]]


def test_a_replayed_step_may_change_whole_block_tables(folder):
    """As after a fork or a swap: more entries than a graph has places for."""
    llm = with_graphs(LLM(folder, attention_backend="triton", **OPTIONS), Recorder())
    runner = llm.engine.executor.runner
    plain = LLM(folder, attention_backend="triton", **OPTIONS).engine.executor.runner
    torch.manual_seed(0)
    for (k, v), (plain_k, plain_v) in zip(
        runner.kv_cache.layers, plain.kv_cache.layers, strict=True
    ):
        plain_k.copy_(k.normal_())
        plain_v.copy_(v.normal_())
    for tables in (
        ([3, 7, 4], [1, 8]),
        ([3, 7, 4], [1, 8]),
        ([9, 7, 4], [6, 2]),
        ([9, 7, 5], [6, 2]),
    ):
        lengths = [4 * len(blocks) - 2 for blocks in tables]
        step = StepInput(
            tuple(SequenceInput(i, [5], lengths[i], blocks) for i, blocks in enumerate(tables))
        )
        torch.testing.assert_close(runner.run(step), plain.run(step))
        assert runner.batches.num_changed == 0


def test_only_a_batch_of_decodes_is_replayed(folder):
    recorder = Recorder()
    options = OPTIONS | {"max_num_seqs": 2, "max_num_batched_tokens": 3}  # prompts in chunks
    llm = with_graphs(LLM(folder, attention_backend="triton", **options), recorder)
    seen: list[tuple[list[int], bool]] = []
    runner = llm.engine.executor.runner
    run = runner.run

    def watched(step):
        before = len(recorder.replayed)
        logits = run(step)
        queries = [len(sequence.token_ids) for sequence in step.sequences]
        seen.append((queries, len(recorder.replayed) > before))
        return logits

    llm.engine.executor.run = watched
    tokens(llm)
    assert any(replayed for _, replayed in seen)
    assert any(1 in queries and max(queries) > 1 for queries, _ in seen)  # mixed steps were met
    assert all(max(queries) == 1 for queries, replayed in seen if replayed)


def test_a_cpu_and_custom_attention_have_no_graphs(folder):
    assert LLM(folder, device="cpu", **OPTIONS).engine.executor.runner.graphs is None
    from minipaged.attention.backend import choose_backend

    backend = choose_backend("triton", "cuda" if torch.cuda.is_available() else "cpu")
    assert backend.cuda_graph_safe
    mine = Parts(paged_attention=reference.reference_paged_attention).attention(backend)
    assert not mine.cuda_graph_safe
    mine = Parts(store_kv=reference.store_kv).attention(backend)
    assert mine.rope_and_store_kv is None  # or a store of one's own would never be called


@pytest.mark.parametrize("largest", [1, 2, 3, 4, 5, 8, 9, 16, 17, 64, 100, 256, 260, 512, 1000])
def test_every_batch_has_a_size_with_few_rows_too_many(largest: int) -> None:
    sizes = sizes_to_record(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(largest, 512)
    for count in range(1, sizes[-1] + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count < min(16 if size > 256 else 8, max(count, 2))


def test_the_number_of_graphs_is_bounded() -> None:
    assert graphs.num_graphs(64, 4096) == 11
    assert graphs.num_graphs(64, 16_384) == 3 * 11
    assert graphs.num_graphs(10_000, 131_072) == 6 * 51


def test_each_bound_of_the_longest_sequence_has_graphs_of_its_own(folder, monkeypatch):
    assert graphs.lengths_to_record(100) == [100]
    assert graphs.lengths_to_record(4096) == [4096]
    assert graphs.lengths_to_record(20_000) == [4096, 8192, 16_384, 20_000]
    expected = tokens(LLM(folder, attention_backend="triton", **OPTIONS))
    monkeypatch.setattr(graphs, "lengths_to_record", lambda longest: [12, longest])
    recorder = Recorder()
    llm = with_graphs(LLM(folder, attention_backend="triton", **OPTIONS), recorder)
    assert tokens(llm) == expected
    assert {longest for _, longest in recorder.replayed} == {12, 24}


def programs(lengths: list[int]) -> tuple[int, int]:
    """Programs of `decode` on an H200 with 8 KV heads: launched by a graph, and with work."""
    bound = next(each for each in graphs.lengths_to_record(131_072) if each >= max(lengths))
    to_fill = splits_to_fill(len(lengths), kv_heads=8, places=528)
    launched = len(lengths) * most_splits(bound, to_fill)
    return 8 * launched, 8 * sum(most_splits(length, to_fill) for length in lengths)


def test_a_graph_launches_the_number_of_programs_in_docs_kernels():
    assert programs([1024] * 64) == (512, 512)
    assert programs([4500] * 64) == (1024, 1024)
    assert programs([17_000] * 64) == (4096, 2560)
    assert programs([32_768] * 64) == (4096, 4096)
    assert programs([32_768] + [1024] * 63) == (4096, 568)


@pytest.mark.parametrize("num_seqs", [1, 4, 16, 64, 256])
def test_equal_lengths_need_half_of_the_programs_or_all_fit_at_once(num_seqs):
    for length in range(1, 131_072, 61):
        launched, needed = programs([length] * num_seqs)
        assert launched <= max(528, 2 * needed)
