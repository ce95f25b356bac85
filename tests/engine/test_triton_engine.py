"""Whole runs of the engine over the Triton kernels: the tokens of the reference, whatever happens.

Each seed draws a model family, block size, pool, prompts and ways of decoding; between them they
meet chunks, shared prefixes, forks, copies, preemption by either way, 8-bit keys and replayed
steps. Interpreted without a GPU, so few tokens are generated.
"""

import random
from collections import Counter
from typing import Any

import pytest
from checkpoints import VOCAB_SIZE, make_checkpoint
from graphs_on_a_cpu import with_graphs

from minipaged import LLM, BeamSearchParams, Parts, SamplingParams
from minipaged.attention.kv_cache import KVCache
from minipaged.sampling import Params
from minipaged.tracing.events import EventLog

pytestmark = pytest.mark.filterwarnings("ignore:no GPU")

FAMILIES = ["llama", "gpt2", "opt", "qwen3"]
SEEDS = [0, 5, 6, 11, 20, 27, 30, 37]  # the pool is too small in each


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def draw_prompts(rng: random.Random) -> list[list[int]]:
    prompts = [
        [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
        for _ in range(rng.randint(2, 4))
    ]
    if rng.random() < 0.5:  # two that share a prefix
        prompts[1] = prompts[0][: rng.randint(1, len(prompts[0]))] + prompts[1][:5]
    return prompts


def draw_params(rng: random.Random) -> Params:
    kind = rng.choice(["greedy", "greedy", "samples", "beams"])
    if kind == "greedy":
        return SamplingParams(temperature=0.0, max_tokens=rng.randint(4, 12), ignore_eos=True)
    if kind == "samples":
        return SamplingParams(n=rng.randint(1, 3), seed=7, max_tokens=6, ignore_eos=True)
    return BeamSearchParams(beam_width=2, max_tokens=rng.randint(1, 6), ignore_eos=True)


def draw_options(rng: random.Random, longest: int) -> dict[str, Any]:
    block_size = rng.choice([1, 2, 3, 4, 8, 16])
    slots = longest + rng.choice([16, 24, 60])  # one sequence fits, two hardly
    return {
        "block_size": block_size,
        "num_blocks": slots // block_size + 1,
        "num_swap_blocks": rng.choice([8, 64, 300]),
        "max_model_len": 64,
        "max_num_seqs": rng.choice([4, 8]),
        "max_num_batched_tokens": rng.choice([8, 16, 64]),
        "kv_cache_dtype": rng.choice(["auto", "auto", "int8", "float16"]),
        "enable_prefix_caching": rng.random() < 0.6,
        "preemption": rng.choice(["auto", "swap", "recompute"]),
    }


def run(folder, seed: int, backend: str, log: EventLog) -> list[list[list[int]]]:
    rng = random.Random(seed)
    prompts = draw_prompts(rng)
    options = draw_options(rng, max(map(len, prompts)))
    params = [draw_params(rng) for _ in prompts]
    parts = Parts().checked().traced(log)
    llm = LLM(folder, attention_backend=backend, parts=parts, **options)
    if backend == "triton" and seed % 2:
        with_graphs(llm)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[completion.token_ids for completion in o.outputs] for o in outputs]


@pytest.mark.parametrize(
    "seed", [*SEEDS[:2], *(pytest.param(s, marks=pytest.mark.full) for s in SEEDS[2:])]
)
def test_the_tokens_are_those_of_the_reference_in_every_scenario(folders, seed):
    folder = folders[FAMILIES[seed % len(FAMILIES)]]
    assert run(folder, seed, "triton", EventLog()) == run(folder, seed, "reference", EventLog())


def test_the_seeds_together_cover_every_kind_of_event(folders):
    met: Counter[str] = Counter()
    for seed in SEEDS:
        log = EventLog()
        log.listeners.append(lambda event: met.update([event.event]))
        run(folders[FAMILIES[seed % len(FAMILIES)]], seed, "reference", log)
    assert {"fork", "copy_on_write", "share", "swap_out", "swap_in", "preempt"} <= set(met)


def starved_tokens(folder, dtype: str) -> list[list[int]]:
    """The tokens of requests of which only one fits, so that the others are swapped."""
    log, met = EventLog(), Counter[str]()
    log.listeners.append(lambda event: met.update([event.event]))
    options = {"block_size": 4, "num_blocks": 9, "num_swap_blocks": 40, "preemption": "swap"}
    llm = LLM(
        folder,
        attention_backend="triton",
        kv_cache_dtype=dtype,
        parts=Parts().checked().traced(log),
        **options,
    )
    found = tokens_of(llm)
    assert met["swap_out"] >= 2
    assert met["swap_in"] >= 2
    return found


def tokens_of(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    prompts = [[5 + i, 9, 2 + i, 7, 11, 3 * i + 4, 8] for i in range(3)]
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_swapping_a_pool_of_any_format_changes_no_token(folders, dtype, monkeypatch):
    folder = folders["llama"]
    ample = tokens_of(LLM(folder, attention_backend="triton", kv_cache_dtype=dtype))
    assert starved_tokens(folder, dtype) == ample
    if dtype == "int8":  # blocks that return without their scales have other keys
        copy = KVCache._copy
        monkeypatch.setattr(KVCache, "_copy", lambda _, a, b, pairs: copy(_, a[:1], b[:1], pairs))
        assert starved_tokens(folder, dtype) != ample
