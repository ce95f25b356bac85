"""A long beginning that several prompts share is computed once, and changes no token."""

import sys

from vllm import LLM, SamplingParams

story = "Once upon a time Theo the frog put the white key in the meadow. " * 6
prompts = [story + question for question in ("Who", "Where", "What animal")]
params = SamplingParams(temperature=0.0, max_tokens=5)

options = {"model": sys.argv[1], "max_model_len": 512, "block_size": 32}
regular = LLM(**options, enable_prefix_caching=False)
expected = [output.outputs[0].token_ids for output in regular.generate(prompts, params)]
del regular

cached = LLM(**options, enable_prefix_caching=True)
cached.generate(prompts[0], params)  # computes the story
outputs = cached.generate(prompts, params)
assert [list(output.outputs[0].token_ids) for output in outputs] == list(map(list, expected))
assert all(output.num_cached_tokens >= 64 for output in outputs)
assert cached.reset_prefix_cache()
