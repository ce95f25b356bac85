"""`minipaged bench gpu`: all that a GPU can show, in one run of at most eight minutes."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from minipaged.cli.bench_options import require_triton
from minipaged.cli.options import AsJson
from minipaged.errors import InvalidOption
from minipaged.utils.counts import counted

if TYPE_CHECKING:
    from minipaged.evaluation.bench.gpu.stage import Stage

LEAST_SECONDS = 10
WIDTH = 250  # of the widest table: a log does not wrap lines


def gpu(
    stages: Annotated[
        str | None, typer.Option(help="Run only these stages, separated by commas.")
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Seconds for all stages together.", min=LEAST_SECONDS)
    ] = 450,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try all stages on the CPU, with tiny inputs.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Append each row to this file when it is finished.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Measure nothing: print the text for docs/kernels.md from this file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check and measure everything that needs a GPU.

    Prints a table per stage. A failure ends only its own part; the exit code is then 1.
    """
    if report is not None:
        if stages or dry_run or save or as_json:
            raise InvalidOption("--report only prints what a file contains: leave out the others.")
        print(_text_of(report))
        return
    require_triton()
    _require_place(dry_run)
    from minipaged.evaluation.bench.gpu import run
    from minipaged.evaluation.bench.gpu import stages as all_stages

    chosen = _choose(stages, all_stages.STAGES)
    rows: list[dict[str, Any]] = []
    measured = run.measure(chosen, all_stages.__name__, budget, dry_run)
    for row in run.saved(measured, save):
        rows.append(row)
        if as_json:
            print(json.dumps(row), flush=True)
        elif row["status"] == "finished":
            of_stage = sum(each["stage"] == row["stage"] for each in rows) - 1
            print(f"{row['stage']}: {counted(of_stage, 'row')}, {row['took']} s", file=sys.stderr)
    failed = any(row["status"] == "failed" for row in rows)
    if not as_json:
        _show(rows, chosen, dry_run)
    raise typer.Exit(1 if failed else 0)


def _require_place(dry_run: bool) -> None:
    import torch

    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
        from minipaged.attention.triton.machine import why_no_triton

        if reason := why_no_triton(torch.device("cpu"), head_dim=32):
            raise InvalidOption(f"bench gpu --dry-run interprets the kernels, but {reason}.")
    elif not torch.cuda.is_available():
        raise InvalidOption(
            "bench gpu needs a GPU, and none was found: run it on a machine with one, or add "
            "--dry-run to try all stages on the CPU."
        )


def _choose(names: str | None, stages: "Sequence[Stage]") -> "list[Stage]":
    by_name = {stage.name: stage for stage in stages}
    wanted = list(by_name) if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in by_name:
            raise InvalidOption(
                f"there is no stage {name!r}: choose among {', '.join(by_name)}.", "stages"
            )
    return [stage for stage in stages if stage.name in wanted]


def _show(rows: list[dict[str, Any]], stages: "Sequence[Stage]", is_dry: bool) -> None:
    from minipaged.evaluation.bench.gpu import markdown
    from minipaged.evaluation.bench.gpu import report as reports

    console = Console(width=WIDTH, soft_wrap=True)
    for stage in stages:
        if of_stage := reports.measured(rows, stage.name):
            console.print(f"{stage.name}: {stage.about}\n", highlight=False)
            console.print(reports.as_table(of_stage), "", sep="\n")
    for line in reports.failures(rows):
        console.print(line, highlight=False, markup=False)
    if is_dry:
        console.print("A dry run: its figures mean nothing.")
    else:
        print(markdown.section(rows))


def _text_of(file: Path) -> str:
    from minipaged.evaluation.bench.gpu import markdown, run

    rows = run.read(file)
    if any(row["dry_run"] for row in rows):
        raise InvalidOption(
            f"{str(file)!r} has rows of a dry run, whose figures mean nothing: run the stages on a "
            "GPU, with another file."
        )
    return markdown.section(rows)
