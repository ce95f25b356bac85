"""The tokenizer as scripts use it: to count, to cut, to end."""

import sys

from vllm import LLM

llm = LLM(model=sys.argv[1], max_model_len=256)
tokenizer = llm.get_tokenizer()
text = "Once upon a time Theo the frog put the white key in the meadow."
ids = tokenizer.encode(text)
assert tokenizer.decode(ids) == text
assert tokenizer(text)["input_ids"] == tokenizer(text).input_ids == ids
assert tokenizer([text, "Nell"]).input_ids[0] == ids
assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
assert tokenizer.convert_tokens_to_ids(tokenizer.eos_token) == tokenizer.eos_token_id
assert len(tokenizer) > max(ids)
assert tokenizer.eos_token_id in tokenizer.all_special_ids
print(len(ids), "tokens")
