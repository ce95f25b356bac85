"""The last task of every lab: the embedded model runs on the student's part and the library's."""

from functools import cache
from typing import Any

from minipaged.evaluation.stories import prompt, tell

SIZES = (1, 2, 4, 8)  # facts of the stories


@cache
def prompts() -> tuple[str, ...]:
    stories = [tell(num_facts=size, seed=size) for size in SIZES]
    asked = [story.questions[index] for index, story in enumerate(stories)]
    return tuple(prompt(story, question) for story, question in zip(stories, asked, strict=True))


@cache
def expected(texts: tuple[str, ...], samples: int, max_tokens: int) -> list[list[list[int]]]:
    """The library's tokens, by prompt and sample."""
    from minipaged.llm import LLM

    return generate(LLM(), texts, samples, max_tokens)


def generate(
    llm: Any, texts: tuple[str, ...], samples: int, max_tokens: int
) -> list[list[list[int]]]:
    from minipaged.sampling import SamplingParams

    temperature = 0.0 if samples == 1 else 1.0
    params = SamplingParams(
        n=samples, temperature=temperature, seed=1, max_tokens=max_tokens, ignore_eos=True
    )
    outputs = llm.generate(list(texts), params, use_tqdm=False)
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def serves_what_the_library_serves(
    observed: Any,
    samples: int = 1,
    texts: tuple[str, ...] | None = None,
    max_tokens: int = 20,
    **options: Any,
) -> None:
    """Check that all tokens are the library's and all blocks are free. Raises AssertionError.

    Args:
        observed: the fixture.
        texts: the prompts. None: a question about each story.
        options: for `observed` and, through it, for the `LLM`.
    """
    texts = texts or prompts()
    with observed(**options) as llm:
        got = generate(llm, texts, samples, max_tokens)
        wanted = expected(texts, samples, max_tokens)
        for text, yours, theirs in zip(texts, got, wanted, strict=True):
            assert yours == theirs, f"tokens after {text[-60:]!r}"
        memory = llm.engine.scheduler.memory
        free = memory.num_free, memory.num_free_swap_blocks
        every = memory.num_blocks, memory.num_swap_blocks
        assert free == every, "free blocks and free swap blocks once all requests have ended"
