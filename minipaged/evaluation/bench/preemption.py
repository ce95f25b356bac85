"""What it costs to preempt a sequence and bring it back: swapped, or recomputed (section 7.3)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil

import torch

from minipaged.evaluation.bench.timing import median_seconds
from minipaged.llm import LLM
from minipaged.sampling import SamplingParams
from minipaged.tokenizer.prompts import Prompt


@dataclass(frozen=True)
class Row:
    """Both ways for one block size; seconds out and back."""

    block_size: int
    swap_seconds: float
    recompute_seconds: float


def measure(
    block_sizes: Iterable[int], num_tokens: int, model: str = "storyteller"
) -> Iterator[Row]:
    """A sequence of so many tokens, for every block size, with this model on the CPU."""
    prompt: Prompt = {"prompt_token_ids": [1 + i % 100 for i in range(num_tokens)]}
    once = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    for block_size in block_sizes:
        num_blocks = ceil(num_tokens / block_size)
        llm = LLM(
            model,
            device="cpu",
            block_size=block_size,
            num_blocks=2 * num_blocks + 2,
            num_swap_blocks=num_blocks,
            enable_prefix_caching=False,
            max_num_seqs=1,
            max_num_batched_tokens=num_tokens,
        )
        yield _measure_one(llm, prompt, once, num_blocks)


def _measure_one(llm: LLM, prompt: Prompt, once: SamplingParams, num_blocks: int) -> Row:
    kv_cache = llm.engine.runner.kv_cache
    out = [(block, block) for block in range(num_blocks)]

    @torch.inference_mode()
    def swap() -> None:
        kv_cache.swap_out(out)
        kv_cache.swap_in(out)

    works = {
        "swap": swap,
        # All of the prompt, and one token sampled: what a preempted sequence goes through.
        "recompute": lambda: llm.generate(prompt, once, use_tqdm=False),
    }
    seconds = median_seconds(works, torch.device("cpu"))
    return Row(llm.engine.config.block_size, seconds["swap"], seconds["recompute"])
