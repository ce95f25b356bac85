"""Where the kernels can run (compiled on a GPU, interpreted on a CPU), and why not elsewhere."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

LARGEST_HEAD = 256  # elements per head; with more, the tiles would not fit
OLDEST_GPU = (8, 0)  # Ampere: the first whose tensor cores take bfloat16
OLDEST_GPU_FOR_FP8 = (8, 9)  # Ada and Hopper

_INTERPRET = "TRITON_INTERPRET"


@cache
def prepare_triton() -> None:
    """Decide how kernels run: once per process, before any kernel is defined.

    They are interpreted if there is no GPU or TRITON_INTERPRET=1 is set. With TRITON_INTERPRET=0
    they are compiled even without a GPU, as by `minipaged bench compile`.
    """
    if find_spec("triton") is None:
        return  # `why_no_triton` says so
    from triton import knobs

    if _INTERPRET not in os.environ:
        knobs.runtime.interpret = not torch.cuda.is_available()
    if knobs.runtime.interpret:
        _interpret_functions_of_triton()
    # The kernels rely on fused multiply-add, which newer versions of Triton must be told to use.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def _interpret_functions_of_triton() -> None:
    """Interpret Triton's own functions, such as `tl.sum`, even if Triton was imported before."""
    from triton import JITFunction
    from triton import language as tl
    from triton.runtime.interpreter import InterpretedFunction

    for module in (tl.standard, tl):
        for name, member in list(vars(module).items()):
            if isinstance(member, JITFunction):
                setattr(module, name, InterpretedFunction(member.fn))


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    prepare_triton()
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_no_triton(device: torch.device, head_dim: int, kv_dtype: str = "auto") -> str | None:
    """Return one sentence on why the kernels cannot serve such a model here; None if they can.

    Args:
        head_dim: elements per head.
        kv_dtype: storage type of keys and values, as `LLM(kv_cache_dtype=...)` names it.
    """
    if find_spec("triton") is None:
        return 'the package "triton" is not installed (it exists for Linux only)'
    if head_dim > LARGEST_HEAD:
        return (
            f"the kernels support heads of up to {LARGEST_HEAD} elements, but this model's have "
            f"{head_dim}"
        )
    if kv_dtype in ("int8", "fp8") and head_dim % 2:
        return (
            f"the kernels read 8-bit elements in pairs, but this model's heads have {head_dim}, an "
            "odd number"
        )
    if device.type == "cuda" and (reason := _why_not_on_gpu(device, kv_dtype)):
        return reason
    if is_interpreted():
        return _why_not_interpreted(kv_dtype)
    if device.type != "cuda":
        return (
            "the kernels of this process are compiled for the GPU, but the model is to run on the "
            f'CPU (set {_INTERPRET}=1 to interpret them, or device="cuda")'
        )
    return None


def _why_not_on_gpu(device: torch.device, kv_dtype: str) -> str | None:
    who, oldest = "the kernels need", OLDEST_GPU
    if kv_dtype == "fp8":
        who, oldest = "fp8 needs", OLDEST_GPU_FOR_FP8
    capability = torch.cuda.get_device_capability(device)
    if capability >= oldest:
        return None
    return (
        f"{who} a GPU of compute capability {oldest[0]}.{oldest[1]} or newer, but "
        f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    )


def _why_not_interpreted(kv_dtype: str) -> str | None:
    if kv_dtype == "fp8":
        return "Triton's interpreter, which replaces a GPU here, rounds fp8 incorrectly"
    import numpy
    import triton

    def version(package: Any) -> tuple[int, ...]:
        return tuple(int(part) for part in package.__version__.split(".")[:2])

    if version(triton) < (3, 9) and version(numpy) >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} does not support NumPy "
            f"{numpy.__version__} (install triton 3.9, or numpy below 2.4)"
        )
    return None


@cache
def has_large_sms(device: torch.device) -> bool:
    """Whether a multiprocessor has 228 KiB of shared memory, as on Hopper and B100 to B300.

    Ampere's has 164 KiB, or 100 KiB in smaller GPUs, as later ones for graphics. Without a GPU, the
    answer is yes.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


class Multiprocessor(NamedTuple):
    """What the programs on one multiprocessor (SM) share."""

    shared_bytes: int
    threads: int
    registers: int = 65_536  # of all GPUs since 2014


def programs_per_sm(registers: int, shared_bytes: int, num_warps: int, sm: Multiprocessor) -> int:
    """Programs that a multiprocessor runs at the same time (its *occupancy*).

    Args:
        registers: of a thread of the compiled kernel.
        shared_bytes: of a program.
        num_warps: the same; a warp has 32 threads.
        sm: the multiprocessor.
    """
    threads = 32 * num_warps
    # Registers are allocated to a thread in units of 8; the driver reserves 1 KiB per program.
    by_registers = sm.registers // (threads * (-(-registers // 8) * 8))
    by_shared = sm.shared_bytes // (shared_bytes + 1024)
    return min(by_registers, by_shared, sm.threads // threads)


def programs_per_gpu(device: torch.device, registers: int, shared_bytes: int, warps: int) -> int:
    """Programs of a compiled kernel that this GPU runs at the same time."""
    gpu = torch.cuda.get_device_properties(device)
    sm = Multiprocessor(gpu.shared_memory_per_multiprocessor, gpu.max_threads_per_multi_processor)
    return gpu.multi_processor_count * programs_per_sm(registers, shared_bytes, warps, sm)
