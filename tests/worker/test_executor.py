"""Several ranks, each a process of its own: the same tokens as one, and few bytes are sent."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoints
from engine_runs import PROMPTS, assert_all_blocks_are_back

from minipaged import LLM, BeamSearchParams, Parts, SamplingParams
from minipaged.scheduler.output import StepInput
from minipaged.worker import process
from minipaged.worker.executor import MultiExecutor
from minipaged.worker.ranks import HEAD

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "opt, 350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", {}),
}
EVERY_KIND = [
    SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=20, ignore_eos=True),
    SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True),
    BeamSearchParams(beam_width=3, max_tokens=9),
] * 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = make_checkpoints(VARIANTS, tmp_path_factory.mktemp("checkpoints"))
    return {**folders, "storyteller": LLM("storyteller").folder}


def start(folder: Path, size: int, **options: Any) -> LLM:
    several = {} if size == 1 else {"step_timeout": 60.0}
    return LLM(
        folder,
        parts=Parts().checked(),
        skip_tokenizer_init=True,
        tensor_parallel_size=size,
        **several,
        **{"num_blocks": 200, "num_swap_blocks": 200, **options},
    )


def results(llm: LLM, prompts=PROMPTS, params=EVERY_KIND) -> list[list[list[int]]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_all_blocks_are_back(llm)
    return [[each.token_ids for each in output.outputs] for output in outputs]


def preemptions(llm: LLM) -> list[int]:
    outputs = llm.generate(PROMPTS, EVERY_KIND, use_tqdm=False)
    return [each.metrics.num_preemptions for each in outputs]


# ---- the same tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*VARIANTS, "storyteller"])
def test_two_ranks_give_the_tokens_of_one_for_every_kind_of_request(checkpoints, variant):
    folder = checkpoints[variant]
    assert results(start(folder, 2)) == results(start(folder, 1))


@pytest.mark.full
@pytest.mark.parametrize("variant", [*VARIANTS, "storyteller"])
def test_four_ranks_give_the_tokens_of_one_also_with_fewer_kv_heads(checkpoints, variant):
    folder = checkpoints[variant]
    assert results(start(folder, 4)) == results(start(folder, 1))


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_ranks_that_are_short_of_blocks_preempt_and_give_the_same_tokens(checkpoints, preemption):
    folder = checkpoints["qwen3"]
    expected = results(start(folder, 1))
    tight = {"num_blocks": 9, "preemption": preemption, "watermark": 0.0}
    llm = start(folder, 2, **tight)
    assert results(llm) == expected
    assert sum(preemptions(llm)) > 0


def test_ranks_find_prefixes_and_give_the_same_tokens(checkpoints):
    folder = checkpoints["llama, biases"]
    shared = [PROMPTS[3] + [each, 7, each] for each in (11, 12, 13)]
    greedy = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    one, two = start(folder, 1), start(folder, 2)
    assert results(two, shared[:1], greedy) == results(one, shared[:1], greedy)
    outputs = two.generate(shared, greedy, use_tqdm=False)
    assert min(each.num_cached_tokens for each in outputs) >= 64
    assert [each.outputs[0].token_ids for each in outputs] == [
        each for [each] in results(one, shared, greedy)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int8"},
        {"attention_backend": "reference"},
        {"max_num_batched_tokens": 64, "max_num_seqs": 5},
        {"enable_chunked_prefill": False},
        {"block_size": 4, "enable_prefix_caching": False},
        {"dtype": "bfloat16"},
        {"load_format": "dummy"},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.full
def test_an_option_of_the_engine_has_the_same_effect_on_two_ranks(checkpoints, options):
    folder = checkpoints["storyteller"]
    one, two = results(start(folder, 1, **options)), results(start(folder, 2, **options))
    if options.get("dtype") == options.get("kv_cache_dtype") is None:
        assert one == two
    else:  # rounding differs between a sum in one piece and one in two
        same = sum(a == b for a, b in zip(one, two, strict=True))
        assert same >= len(one) // 2


def test_log_probabilities_of_two_ranks_are_those_of_one(checkpoints):
    folder = checkpoints["gpt2"]
    params = SamplingParams(
        temperature=0.0, max_tokens=6, logprobs=5, prompt_logprobs=3, ignore_eos=True
    )
    one, two = (
        start(folder, size).generate(PROMPTS[:4], params, use_tqdm=False) for size in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        rows_a = [*(a.prompt_logprobs or [])[1:], *(a.outputs[0].logprobs or [])]
        rows_b = [*(b.prompt_logprobs or [])[1:], *(b.outputs[0].logprobs or [])]
        for row_a, row_b in zip(rows_a, rows_b, strict=True):
            assert row_a.keys() == row_b.keys()
            for token, found in row_a.items():
                assert found.logprob == pytest.approx(row_b[token].logprob, abs=1e-4)


# ---- what is sent --------------------------------------------------------------------------------


def test_a_step_is_one_message_two_sums_per_layer_one_sum_and_one_gather():
    llm = LLM("storyteller", tensor_parallel_size=2, num_blocks=300, max_num_seqs=64)
    executor = llm.engine.executor
    assert isinstance(executor, MultiExecutor)
    sizes: list[int] = []
    send = executor.ranks.send
    executor.ranks.send = lambda numbers: (sizes.append(4 * len(numbers)), send(numbers))[1]
    counts = executor.ranks.counts
    for number in range(64):
        llm.engine.add_request(str(number), [300 + number] * 20, SamplingParams(max_tokens=8))
    num_steps = 0
    while llm.engine.has_unfinished_requests():
        before = dict(counts)
        sizes.clear()
        llm.engine.step()
        num_steps += 1
        grown = {name: counts[name] - before.get(name, 0) for name in counts}
        num_layers = executor.runner.model.config.num_layers
        sums = 2 * num_layers + 1
        assert grown == {"message": 1, "all-reduce": sums, "gather": 1, "step": 1}
        assert len(sizes) == 1
        if num_steps > 4:  # all 64 decode
            assert 64 * 4 < sizes[0] <= 8000
            assert sizes[0] <= 4 * HEAD  # in one piece
    assert num_steps > 8


def test_several_ranks_refuse_a_token_whose_value_only_rank_0_has():
    executor = object.__new__(MultiExecutor)
    with pytest.raises(AssertionError, match="other ranks need the value of every token"):
        executor.run(StepInput(()), torch.tensor([5]))


def test_all_ranks_record_graphs_after_the_options_and_before_the_first_step(monkeypatch):
    """Recording runs the model, whose ranks exchange sums: all must do it at the same time."""
    done: list[str] = []

    class Runner:
        def record_graphs(self, shows_progress: bool = True) -> None:
            done.append("record")

    class Connection:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def send_object(self, config: object) -> None:
            done.append("options")

        def start_steps(self) -> None:
            done.append("ready")

        def receive(self) -> list[int]:
            return [process.STOP]

    executor = object.__new__(MultiExecutor)
    executor.ranks = Connection(0)
    executor.start(None, Runner())
    assert done == ["options", "record", "ready"]
    done.clear()

    def build(args: object, ranks: Connection, device: object) -> Runner:
        done.append("options")  # it has received them
        return Runner()

    monkeypatch.setattr(process, "_build_runner", build)
    process.work(None, Connection(1), torch.device("cpu"))
    assert done == ["options", "record", "ready"]


def test_each_rank_keeps_its_share_of_weights_and_blocks(checkpoints):
    one, two = start(checkpoints["storyteller"], 1), start(checkpoints["storyteller"], 2)
    pools = [each.engine.executor.runner.kv_cache.layers[0][0].numel() for each in (one, two)]
    assert pools[1] * 2 == pools[0]
    assert two.engine.executor.runner.model.config.num_kv_heads == 1


def test_the_pool_is_as_large_as_on_the_rank_with_the_least_room(checkpoints, monkeypatch):
    monkeypatch.setattr("minipaged.engine.build.room_for_blocks", lambda *_: 77)
    llm = LLM(checkpoints["qwen3"], tensor_parallel_size=2, skip_tokenizer_init=True)
    assert llm.engine.memory.num_blocks == 77


def test_ranks_report_where_their_time_went():
    llm = LLM("storyteller", tensor_parallel_size=2, num_blocks=64)
    executor = llm.engine.executor
    assert isinstance(executor, MultiExecutor)
    llm.generate("Theo", SamplingParams(max_tokens=5, temperature=0), use_tqdm=False)
    for seconds in executor.report():
        assert 0 < seconds["all-reduce"] < seconds["step"]
        assert 0 < seconds["gather"] < seconds["step"]
        assert seconds["message"] > 0
    assert all(each["step"] == 0 for each in executor.report())


def test_an_engine_that_is_deleted_ends_its_workers():
    llm = LLM("storyteller", tensor_parallel_size=2, num_blocks=64)
    executor = llm.engine.executor
    assert isinstance(executor, MultiExecutor)
    processes = [each.process for each in executor._workers._started]
    assert [each.poll() for each in processes] == [None]
    del llm, executor
    gc.collect()
    assert [each.poll() for each in processes] == [0]
