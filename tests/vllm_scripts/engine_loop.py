"""The engine by itself: requests are added while others are served."""

import argparse
import sys

from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

whole = RequestOutputKind.FINAL_ONLY  # both samples in one result
test_prompts = [
    ("Once upon a time", SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1)),
    ("Theo the frog", SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2, seed=1)),
    ("Nell the goat", SamplingParams(n=2, temperature=0.8, top_p=0.95, seed=2, output_kind=whole)),
]


def process_requests(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Continuously process the prompts and handle the outputs."""
    request_id, finished = 0, {}
    while test_prompts or engine.has_unfinished_requests():
        if test_prompts:
            prompt, sampling_params = test_prompts.pop(0)
            engine.add_request(str(request_id), prompt, sampling_params)
            request_id += 1
        for request_output in engine.step():
            if request_output.finished:
                finished[request_output.request_id] = request_output
    return finished


args = argparse.Namespace(model=sys.argv[1], max_model_len=256, max_num_seqs=8)
engine = LLMEngine.from_engine_args(EngineArgs(**vars(args)))
finished = process_requests(engine)
assert sorted(finished) == ["0", "1", "2"]
assert [len(finished[name].outputs) for name in "012"] == [1, 1, 2]
for output in finished.values():
    for completion in output.outputs:
        print(output.prompt, completion.index, repr(completion.text))
        assert completion.finished()
assert engine.get_num_unfinished_requests() == 0
