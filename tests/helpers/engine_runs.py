"""Engines with checked parts, run to the end."""

from dataclasses import replace

from checkpoints import VOCAB_SIZE

from minipaged import LLM, Parts, SamplingParams

LENGTHS = (3, 50, 17, 64, 1, 31, 33, 8)
PROMPTS = [[(7 * i + 11 * n) % (VOCAB_SIZE - 3) + 3 for i in range(n)] for n in LENGTHS]
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)


def checked(folder, **options) -> LLM:
    return LLM(folder, parts=options.pop("parts", Parts()).checked(), **options)


def run(llm: LLM, prompts=PROMPTS, params=GREEDY):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_all_blocks_are_back(llm)
    return outputs


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def set_eos(llm: LLM, *token_ids: int) -> None:
    """Let other tokens end a sequence: random models never generate their own end token."""
    llm.engine.traits = replace(llm.engine.traits, eos_token_ids=token_ids)


def assert_all_blocks_are_back(llm: LLM) -> None:
    memory = llm.engine.scheduler.memory
    assert memory.num_free == memory.num_blocks
    assert memory.num_free_swap_blocks == memory.num_swap_blocks
    assert not memory.tables
    assert all(memory.ref_count(block) == 0 for block in range(memory.num_blocks))
