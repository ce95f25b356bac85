"""`minipaged soak ...`: long random runs. torch is imported only once a command needs it."""

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
    help="Look for mismatches in long random runs.",
    rich_markup_mode=None,
)
PARTS_OF_MEMORY = ("allocator", "block_table", "prefix_cache", "memory")

Count = Annotated[int, typer.Option(help="How many to run.", min=1)]


@app.callback(invoke_without_command=True)
def soak(context: typer.Context) -> None:
    """Look for mismatches in long random runs.

    The last line is the count and the number of mismatches. The exit code is 1 if there was one,
    and Ctrl-C reports what was done so far.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def memory(
    count: Count = 100_000, seed: Seed = 0, part: Part = None, as_json: AsJson = False
) -> None:
    """Random operations on block managers, next to a model of the tensors."""
    from minipaged.evaluation.soak.memory import MemorySoak

    run_and_report(
        MemorySoak(count, seed, _memory_with(read_custom_parts(part or ()))), part, as_json
    )


@app.command()
def engines(count: Count = 100, seed: Seed = 0, part: Part = None, as_json: AsJson = False) -> None:
    """Random requests to random engines, compared with each request alone."""
    from minipaged.evaluation.soak.engines import EnginesSoak

    run_and_report(
        EnginesSoak(count, seed, parts_with(read_custom_parts(part or ()))), part, as_json
    )


@app.command()
def faults(count: Count = 100, seed: Seed = 0, as_json: AsJson = False) -> None:
    """Exceptions and Ctrl-C wherever a function begins or returns: no other request may change."""
    from minipaged.evaluation.soak.fault_runs import FaultsSoak

    run_and_report(FaultsSoak(count, seed), None, as_json)


@app.command()
def vllm(
    python: Annotated[Path, typer.Option(help="The Python of an environment with vLLM.")],
    count: Count = 32,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Random prompts to a small Llama, compared with vLLM in another environment."""
    from minipaged.evaluation.soak.against_vllm import VLLMSoak

    run_and_report(VLLMSoak(count, seed, python), None, as_json)


def run_and_report(soak: "Soak", part: list[str] | None, as_json: bool) -> None:
    """Run a soak and print what it found; ends with exit code 1 if there was a mismatch."""
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
                f"--part names {name!r}, which is no part of the memory: choose one of "
                f"{', '.join(PARTS_OF_MEMORY)}, or soak engines.",
                "part",
            )
    allocator, block_table, prefix_cache, build = (
        find_part(name, custom_parts) for name in PARTS_OF_MEMORY
    )
    return partial(
        build, allocator=allocator, prefix_cache=partial(prefix_cache, block_table=block_table)
    )
