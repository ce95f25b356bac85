"""The options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from minipaged import __version__

Model = Annotated[str, typer.Option(help="storyteller, a folder, or owner/name on the hub.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Backend = Annotated[
    str, typer.Option(help="auto, reference, blockwise, torch, triton or triton-naive.")
]
KVDtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, int8 or fp8.")]
Memory = Annotated[
    str,
    typer.Option(
        help="paged; or a baseline: contiguous-max, contiguous-pow2, contiguous-oracle, static, "
        "virtual, virtual-sliced, virtual-2m, virtual-2m-sliced."
    ),
]
BlockSize = Annotated[int, typer.Option(help="Token slots in a block.")]
NumBlocks = Annotated[int | None, typer.Option(help="Blocks in the pool; default: ample.")]
Preemption = Annotated[str, typer.Option(help="auto, recompute or swap.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
ShowBlocks = Annotated[bool, typer.Option("--show-blocks", help="Draw the pool live.")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines: one JSON object a line.")]
Trace = Annotated[Path | None, typer.Option(help="Write every event to this file, as JSON lines.")]

Swap = Annotated[
    list[str] | None,
    typer.Option(help="Let a part of yours play a role: allocator=mine.py:MyAllocator."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"minipaged {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]
