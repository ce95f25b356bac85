"""`minipaged bench compile`: compiles every kernel ahead of time, for GPUs that may be absent.

A correct kernel is slow if it spills registers to memory, needs so much shared memory that a
multiprocessor runs one program at a time, or does not get the intended instructions. The compiled
code shows all this, and the compiler needs no GPU. `launches.py` collects what is compiled.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from rich.table import Table
from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from minipaged.attention.triton.machine import (
    OLDEST_GPU_FOR_FP8,
    Multiprocessor,
    programs_per_sm,
)
from minipaged.attention.triton.naive_decode import naive_kernel
from minipaged.attention.triton.shapes import TileShape, TileShapes
from minipaged.errors import InvalidOption
from minipaged.evaluation.bench.launches import (
    SETTINGS,
    Launch,
    Setting,
    catch_launches,
    launch_everything,
)

SMS = (80, 90)  # Ampere (A100) and Hopper (H100)

# As in a launch, which otherwise would not find the compiled kernel in Triton's cache.
MARKS_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)

_MULTIPROCESSORS = {  # CUDA C++ Programming Guide
    80: Multiprocessor(shared_bytes=164 * 1024, threads=2048),
    86: Multiprocessor(shared_bytes=100 * 1024, threads=1536),
    89: Multiprocessor(shared_bytes=100 * 1024, threads=1536),
    90: Multiprocessor(shared_bytes=228 * 1024, threads=2048),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as the compiler made it, for one GPU."""

    kernel: str
    heads: str  # query heads / KV heads x elements per head
    dtype: str  # of queries
    kv_dtype: str  # of the pool, as `LLM(kv_cache_dtype=...)` names it
    sm: int  # compute capability, times ten
    registers: int  # of a thread
    stack_bytes: int  # of a thread; above 0: it spills, or indexes an array of its own
    shared_bytes: int  # of a program
    num_warps: int  # of a program, 32 threads each
    instructions: str  # that multiply matrices: "HGMMA", "HMMA" or "-"
    # The instructions that read keys and values: "LDGSTS.128" copies 128 bits, the maximum, to
    # shared memory asynchronously; "LDG" loads them to registers.
    reads: str
    # Copies to shared memory, of keys, values or scales, that are under way while the loop
    # multiplies a tile; 0: the loop waits for all of them first.
    copies_ahead: int
    # Instructions that warps issue per KiB of keys and values, in the loop that multiplies; 0.0:
    # it does not. A multiprocessor issues up to 4 in each cycle.
    issued_per_kib: float

    @property
    def programs(self) -> int:
        """Programs per multiprocessor: while one waits for memory, another computes."""
        sm = _MULTIPROCESSORS[self.sm]
        return programs_per_sm(self.registers, self.shared_bytes, self.num_warps, sm)


def compile_all(
    settings: Iterable[Setting] = SETTINGS,
    sms: Iterable[int] = SMS,
    tile: TileShape | None = None,
    tiles: TileShapes | None = None,
) -> Iterator[Compiled]:
    """Compile every kernel in every setting for every GPU that can run it, without duplicates.

    Args:
        settings: the types and heads to compile for.
        sms: the compute capabilities, times ten.
        tile, tiles: the tile shapes of decode and of prefill to try; None: the defaults.

    Raises:
        InvalidOption: the kernels of this process are interpreted.
    """
    kernel: Any = naive_kernel
    if not isinstance(kernel, JITFunction):
        raise InvalidOption(
            "the kernels of this process are interpreted, so they cannot be compiled: set "
            "TRITON_INTERPRET=0 before it starts."
        )
    jobs: dict[str, tuple[Launch, Setting, int]] = {}
    for setting, sm in product(settings, sms):
        if setting.kv_dtype == "fp8" and divmod(sm, 10) < OLDEST_GPU_FOR_FP8:
            continue
        with catch_launches() as launches:
            launch_everything(setting, sm, tile, tiles)
        for launch in launches:
            jobs.setdefault(_identity(launch, sm), (launch, setting, sm))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # which start ptxas and cuobjdump
        yield from threads.map(lambda job: compile_launch(*job), jobs.values())


def _specialize(launch: Launch, sm: int) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """Return the type and known properties of each argument, and the options.

    This is Triton's own function, as in a real launch: a stride of 1 becomes a constant, and
    pointers that are multiples of 16 are marked.
    """
    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", sm, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = bind(*launch.args, **launch.kwargs)
    return specialization, options


def _identity(launch: Launch, sm: int) -> str:
    return f"{launch.kernel.__name__} {sm} {_specialize(launch, sm)}"


def compile_launch(launch: Launch, setting: Setting, sm: int) -> Compiled:
    """Compile one launch of this setting for this GPU."""
    target = GPUTarget("cuda", sm, 32)
    backend = make_backend(target)
    specialization, options = _specialize(launch, sm)
    names = launch.kernel.arg_names
    bound = {**dict(zip(names, launch.args, strict=False)), **launch.kwargs}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, (name, (kind, known)) in enumerate(zip(names, specialization, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[i,] = bound[name]
            if MARKS_CONSTANTS:
                attributes[i,] = []
        elif isinstance(known, str):
            attributes[i,] = backend.parse_attr(known)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled: Any = triton.compile(source, target=target, options=options)
    usage, code = _examine(compiled.asm)
    return Compiled(
        kernel=launch.kernel.__name__.removesuffix("_kernel") + ", split" * bound.get("SPLIT", 0),
        heads=f"{setting.heads}/{setting.kv_heads} x {setting.head_dim}",
        dtype=str(setting.dtype).removeprefix("torch."),
        kv_dtype=setting.kv_dtype,
        sm=sm,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        instructions=next((name for name in ("HGMMA", "HMMA") if f" {name}." in code), "-"),
        reads=_wide_reads(code),
        copies_ahead=_copies_ahead(compiled.asm["ttgir"]),
        issued_per_kib=_issued_per_kib(code),
    )


def _examine(asm: dict[str, Any]) -> tuple[dict[str, int], str]:
    """The kernel's resources on a multiprocessor, and its matrix instructions."""
    command = [knobs.nvidia.cuobjdump.path, "-res-usage"]
    if "mma.sync" in asm["ptx"] or "wgmma." in asm["ptx"]:
        command.append("-sass")  # slow: only if there is something to find
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(asm["cubin"])
        run = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True)
    usage = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", run.stdout)}
    return usage, run.stdout


def _wide_reads(code: str) -> str:
    """The reads of keys and values; narrower reads are table entries and scales."""
    for name in ("LDGSTS", "LDG"):
        reads = re.findall(rf" {name}\.([\w.]+)", code)
        widths = {w for read in reads for w in read.split(".") if w in ("64", "128")}
        if widths:
            return f"{name}." + "/".join(sorted(widths, key=int))
    return "-"


def _copies_ahead(ttgir: str) -> int:
    """The largest number of copies that a wait of the kernel leaves under way."""
    return max((int(num) for num in re.findall(r"async_wait .*num = (\d+)", ttgir)), default=0)


def _issued_per_kib(code: str) -> float:
    """Instructions of a warp in the first loop that multiplies, per KiB that it copies there."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.+?);", code)
    instructions = [(int(address, 16), text) for address, text in lines]
    for end, text in instructions:
        if not (back := re.search(r"\bBRA .*0x([0-9a-f]+)", text)) or int(back[1], 16) > end:
            continue
        loop = [text for address, text in instructions if int(back[1], 16) <= address <= end]
        widths = re.findall(r"LDGSTS\.[\w.]*\b(64|128)\b", "\n".join(loop))  # bits per thread
        if widths:
            return 1024 * len(loop) / sum(32 * int(width) // 8 for width in widths)
    return 0.0


def as_table(rows: Iterable[Compiled]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    for title in ("kernel", "heads", "queries", "pool", "GPU"):
        table.add_column(title)
    for title in ("warps", "registers", "stack", "shared", "programs"):
        table.add_column(title, justify="right")
    for title in ("matrices", "reads"):
        table.add_column(title)
    for title in ("ahead", "issued / KiB"):
        table.add_column(title, justify="right")
    for row in rows:
        names = (row.kernel, row.heads, row.dtype, row.kv_dtype, f"sm_{row.sm}")
        sizes = (row.num_warps, row.registers, row.stack_bytes, row.shared_bytes, row.programs)
        loop = (str(row.copies_ahead), f"{row.issued_per_kib:.0f}" if row.issued_per_kib else "")
        table.add_row(*names, *map(str, sizes), row.instructions, row.reads, *loop)
    return table
