"""The likeliest sequences after each prompt."""

import sys

from vllm import LLM
from vllm.sampling_params import BeamSearchParams

llm = LLM(model=sys.argv[1], max_model_len=256, max_logprobs=20)
params = BeamSearchParams(beam_width=3, max_tokens=6)
outputs = llm.beam_search([{"prompt": "Once upon a time"}, {"prompt": "Theo"}], params)

tokenizer = llm.get_tokenizer()
for output in outputs:
    assert len(output.sequences) == 3
    scores = [sequence.cum_logprob for sequence in output.sequences]
    assert scores == sorted(scores, reverse=True)
    for sequence in output.sequences:
        print(f"{sequence.cum_logprob:.2f} {sequence.text!r}")
        assert sequence.text == tokenizer.decode(sequence.tokens, skip_special_tokens=True)
assert outputs[0].sequences[0].text.startswith("Once upon a time")
