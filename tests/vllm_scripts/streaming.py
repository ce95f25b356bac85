"""Steps that give all so far, only what is new, or nothing before the end."""

import sys

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

engine = LLMEngine.from_engine_args(EngineArgs(model=sys.argv[1], max_model_len=256))


def read(kind: RequestOutputKind) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, output_kind=kind)
    engine.add_request(kind.name, "Theo the frog", params)
    pieces = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            pieces.append(list(output.outputs[0].token_ids))
    return pieces


cumulative, delta = read(RequestOutputKind.CUMULATIVE), read(RequestOutputKind.DELTA)
[final] = read(RequestOutputKind.FINAL_ONLY)
assert cumulative[-1] == final
assert [len(piece) for piece in cumulative] == [1, 2, 3, 4, 5]
assert [token for piece in delta for token in piece] == final
assert max(map(len, delta)) == 1
