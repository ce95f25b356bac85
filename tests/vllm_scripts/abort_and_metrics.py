"""Requests that are aborted, and when the others were served."""

import sys
import time

from vllm import EngineArgs, LLMEngine, SamplingParams

start = time.time()
args = EngineArgs(model=sys.argv[1], max_model_len=256, disable_log_stats=False)
engine = LLMEngine.from_engine_args(args)
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
for name in ("stays", "goes", "goes too", "and this"):
    engine.add_request(name, "Once upon a time", params)
engine.step()
assert engine.get_num_unfinished_requests() == 4
engine.abort_request(["goes", "goes too"])
engine.abort_request(["and this"])
assert engine.get_num_unfinished_requests() == 1

finished = []
while engine.has_unfinished_requests():
    finished += [output for output in engine.step() if output.finished]
[output] = finished
assert output.request_id == "stays"
metrics = output.metrics
assert start - 1 < metrics.arrival_time < time.time() + 1
assert metrics.queued_ts <= metrics.scheduled_ts <= metrics.first_token_ts < metrics.last_token_ts
print(f"first token after {metrics.first_token_ts - metrics.queued_ts:.3f} s")
