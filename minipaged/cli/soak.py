"""`minipaged soak ...`: long random runs. torch is imported only when a command needs it."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minipaged.cli.options import AsJson, Part, Seed
from minipaged.engine.custom_parts import find_part, parts_with, read_custom_parts
from minipaged.errors import InvalidOption

if TYPE_CHECKING:
    from minipaged.evaluation.soak.pool import BuildMemory
    from minipaged.evaluation.soak.run import Soak

app = typer.Typer(
    help="Search for mismatches in long random runs.",
    rich_markup_mode=None,
)
PARTS_OF_MEMORY = ("allocator", "block_table", "prefix_cache", "memory")

Count = Annotated[int, typer.Option(help="Number of random cases.", min=1)]


@app.callback(invoke_without_command=True)
def soak(context: typer.Context) -> None:
    """Search for mismatches in long random runs.

    The last line gives the number of cases and of mismatches. Exits with code 1 if there was a
    mismatch. Ctrl-C stops the run and reports what was done.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def memory(
    count: Count = 100_000, seed: Seed = 0, part: Part = None, as_json: AsJson = False
) -> None:
    """Check block managers with random operations."""
    from minipaged.evaluation.soak.memory import MemorySoak

    run_and_report(
        MemorySoak(count, seed, _memory_with(read_custom_parts(part or ()))), part, as_json
    )


@app.command()
def engines(count: Count = 100, seed: Seed = 0, part: Part = None, as_json: AsJson = False) -> None:
    """Compare random batches with each request run alone."""
    from minipaged.evaluation.soak.engines import EnginesSoak

    run_and_report(
        EnginesSoak(count, seed, parts_with(read_custom_parts(part or ()))), part, as_json
    )


@app.command()
def faults(count: Count = 100, seed: Seed = 0, as_json: AsJson = False) -> None:
    """Inject exceptions and Ctrl-C; other requests must not change.

    A fault is injected where a function begins or returns.
    """
    from minipaged.evaluation.soak.fault_runs import FaultsSoak

    run_and_report(FaultsSoak(count, seed), None, as_json)


@app.command()
def vllm(
    python: Annotated[Path, typer.Option(help="Python of an environment with vLLM.")],
    count: Count = 32,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compare a small Llama with vLLM in another environment."""
    from minipaged.evaluation.soak.against_vllm import VLLMSoak

    run_and_report(VLLMSoak(count, seed, python), None, as_json)


def run_and_report(soak: "Soak", part: list[str] | None, as_json: bool) -> None:
    """Run a soak and print its results. Exits with code 1 if there was a mismatch."""
    soak.run()
    if as_json:
        print(json.dumps(soak.as_dict()))
    else:
        for line in soak.details():
            print(line)
        if soak.first_mismatch is not None:
            print(f"the first mismatch: {soak.first_mismatch}")
            print("to reproduce it:", soak.reproduce, *(f"--part {each}" for each in part or ()))
        print(soak.last_line())
    if soak.num_mismatches:
        raise typer.Exit(1)
    if soak.was_interrupted:
        raise KeyboardInterrupt


def _memory_with(custom_parts: dict[str, Any]) -> "BuildMemory":
    """A block manager with custom parts. Raises InvalidOption for a part that it does not have."""
    for name in custom_parts:
        if name not in PARTS_OF_MEMORY:
            raise InvalidOption(
                f"--part names {name!r}, which does not belong to the memory: choose one of "
                f"{', '.join(PARTS_OF_MEMORY)}, or run `minipaged soak engines`.",
                "part",
            )
    allocator, block_table, prefix_cache, build = (
        find_part(name, custom_parts) for name in PARTS_OF_MEMORY
    )
    return partial(
        build, allocator=allocator, prefix_cache=partial(prefix_cache, block_table=block_table)
    )
