"""How likely each token was, its rank, its text; for the prompt as well."""

import math
import sys

from vllm import LLM, SamplingParams

llm = LLM(model=sys.argv[1], max_model_len=256, max_logprobs=-1)
params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=2)
[output] = llm.generate(["Theo the frog"], params)

completion = output.outputs[0]
tokenizer = llm.get_tokenizer()
total = 0.0
for token_id, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
    assert next(iter(logprobs)) == token_id
    assert 3 <= len(logprobs) <= 4
    chosen = logprobs[token_id]
    assert chosen.rank == 1  # of greedy sampling
    assert chosen.decoded_token == tokenizer.decode([token_id])
    total += chosen.logprob
    ranked = sorted(logprobs.values(), key=lambda each: each.rank)
    assert [each.rank for each in ranked[:3]] == [1, 2, 3]
    assert ranked[0].logprob >= ranked[1].logprob >= ranked[2].logprob
    print([f"{each.decoded_token!r} {math.exp(each.logprob):.0%}" for each in ranked])
assert abs(total - completion.cumulative_logprob) < 1e-3

assert output.prompt_logprobs[0] is None
assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
for token_id, logprobs in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
    assert logprobs[token_id].rank >= 1

everything = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1)
[whole] = llm.generate(["Theo the frog"], everything)[0].outputs[0].logprobs
assert abs(sum(math.exp(each.logprob) for each in whole.values()) - 1) < 1e-3
