"""All stages, in the order in which they run: what others are compared with, then the kernels."""

from functools import partial

from minipaged.evaluation.bench.gpu import (
    attention,
    compiling,
    correctness,
    counters,
    machine,
    sampler,
    step,
    swap,
)
from minipaged.evaluation.bench.gpu.stage import Part, Setup, Stage
from minipaged.evaluation.bench.kernel import LLAMA_3_8B
from minipaged.evaluation.bench.writes import measure_writes


def _write_parts(setup: Setup) -> list[Part]:
    heads, num_layers = (attention.TINY, 2) if setup.is_dry else (LLAMA_3_8B, 32)
    sizes: dict[str, object] = {"step_sizes": (3,), "num_pairs": 2} if setup.is_dry else {}
    writes = partial(measure_writes, heads, num_layers, "triton", setup.device, setup.dtype)
    return [Part("stores and copies", partial(writes, **sizes))]


STAGES = (
    Stage("machine", 20, "Versions, bandwidth and matrix products.", machine.parts),
    Stage("compile", 60, "The kernels as compiled for this GPU.", compiling.parts),
    Stage(
        "correctness",
        70,
        "Relative error of the worst head, compared with float64.",
        correctness.parts,
    ),
    Stage(
        "decode",
        100,
        'Percent of floor: of the bandwidth of a large copy. "triton" has the shipped tile, others '
        "have these positions, warps and stages. Times baseline: the best SDPA.",
        attention.decode_parts,
    ),
    Stage(
        "prefill",
        40,
        "Tiles: rows, positions, warps and stages. Times baseline: the best SDPA.",
        attention.prefill_parts,
    ),
    Stage("writes", 10, "Stores and copies, compared with PyTorch's indexing.", _write_parts),
    Stage(
        "step",
        60,
        "Decode steps. Floor: bytes of weights, keys and values over the bandwidth of a copy.",
        step.step_parts,
    ),
    Stage("profile", 25, "The largest kernels of a decode step.", step.profile_parts),
    Stage("counters", 45, "Hardware counters, by Nsight Compute.", counters.parts),
    Stage("sampler", 10, "Sampling, until the tokens are on the host.", sampler.parts),
    Stage("swap", 10, "Blocks to host memory and back.", swap.parts),
)
