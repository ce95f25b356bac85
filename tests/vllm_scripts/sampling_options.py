"""Options for the choice of tokens, and for the text."""

import sys

from vllm import LLM, SamplingParams

llm = LLM(model=sys.argv[1], max_model_len=256)
tokenizer = llm.get_tokenizer()


def complete(params, prompt="Theo the frog"):
    [output] = llm.generate(prompt, params, use_tqdm=False)
    return output.outputs[0]


greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
usual = complete(greedy)
first = usual.token_ids[0]

changed = greedy.clone()
changed.logit_bias = {first: -100.0}  # parameters can be changed
assert complete(changed).token_ids[0] != first
assert greedy.logit_bias is None

story = SamplingParams(temperature=0.0, max_tokens=16)
assert "in" in complete(story, "Once upon a time").text.split()
story.bad_words = ["in"]  # one token, with a space before it and without
assert "in" not in complete(story, "Once upon a time").text.split()

two = sorted({first, usual.token_ids[-1], 300})[:2]
allowed = SamplingParams(temperature=1.0, seed=1, max_tokens=8, allowed_token_ids=two)
assert set(complete(allowed).token_ids) <= set(two)

biased = SamplingParams.from_optional(temperature=0.0, max_tokens=3, logit_bias={"300": 1000.0})
assert list(complete(biased).token_ids) == [300, 300, 300]

stop = usual.text[3:6]
without = SamplingParams(temperature=0.0, max_tokens=8, stop=[stop])
kept = SamplingParams(temperature=0.0, max_tokens=8, stop=stop, include_stop_str_in_output=True)
ended = complete(without)
assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
assert not ended.text.endswith(stop)
assert complete(kept).text == ended.text + stop

end = tokenizer.eos_token_id
ending = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={end: 100.0})
assert complete(ending).finish_reason == "stop"
assert complete(ending).stop_reason is None
ending.ignore_eos = True
assert complete(ending).text == ""
ending.skip_special_tokens = False
assert complete(ending).text == 4 * tokenizer.eos_token
ending.ignore_eos, ending.min_tokens = False, 3
assert len(complete(ending).token_ids) == 4

silent = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
assert complete(silent).text == ""
assert complete(silent).token_ids == usual.token_ids
print(repr(usual.text))
