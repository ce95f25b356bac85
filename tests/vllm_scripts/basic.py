"""Prompts in a list, one set of sampling parameters, texts out."""

import sys

from vllm import LLM, SamplingParams

prompts = ["Once upon a time", "Theo the frog", "Nell the goat went to", "The white key"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8, seed=1)

llm = LLM(model=sys.argv[1], max_model_len=256)
outputs = llm.generate(prompts, sampling_params)

assert [output.prompt for output in outputs] == prompts
for output in outputs:
    generated_text = output.outputs[0].text
    print(f"Prompt: {output.prompt!r}, Generated text: {generated_text!r}")
    assert output.finished
    assert 0 < len(output.outputs[0].token_ids) <= 8
    assert output.outputs[0].finish_reason in ("length", "stop")
