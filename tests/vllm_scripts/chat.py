"""One conversation and many; the tokenizer's chat template by hand."""

import sys

from vllm import LLM, SamplingParams

llm = LLM(model=sys.argv[1], max_model_len=256)
tokenizer = llm.get_tokenizer()
params = SamplingParams(temperature=0.0, max_tokens=6)
conversation = [
    {"role": "system", "content": "Theo the frog has the white key."},
    {"role": "user", "content": "Who has the key?"},
]

[one] = llm.chat(conversation, params, use_tqdm=False)
many = llm.chat([conversation, conversation[1:]], sampling_params=params, use_tqdm=False)
assert one.outputs[0].text == many[0].outputs[0].text

text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
ids = tokenizer.encode(text, add_special_tokens=False)
[by_hand] = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
assert by_hand.prompt_token_ids == one.prompt_token_ids
assert by_hand.outputs[0].token_ids == one.outputs[0].token_ids
print(one.outputs[0].text)
