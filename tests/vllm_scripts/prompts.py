"""Prompts as text, as token ids, as dicts; parameters for all or for each."""

import sys

from vllm import LLM, SamplingParams, TextPrompt, TokensPrompt
from vllm.inputs import PromptType

llm = LLM(model=sys.argv[1], max_model_len=256)
params = SamplingParams(temperature=0.0, max_tokens=4)
text = "Once upon a time"
ids = llm.get_tokenizer().encode(text)
prompts: list[PromptType] = [
    text,
    TextPrompt(prompt=text),
    TokensPrompt(prompt_token_ids=ids),
    {"prompt_token_ids": ids},
    {"prompt": text, "cache_salt": "mine"},
]
outputs = llm.generate(prompts=prompts, sampling_params=params, use_tqdm=False)
assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
assert all(output.prompt_token_ids == ids for output in outputs)

each = [SamplingParams(temperature=0.0, max_tokens=length) for length in (1, 2, 3)]
outputs = llm.generate([text, "Theo", "Nell"], each, use_tqdm=False)
assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3]
