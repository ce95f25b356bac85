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
