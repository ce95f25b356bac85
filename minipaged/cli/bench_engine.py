"""`minipaged bench engine`: the whole engine on a CPU, and its peers."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from minipaged.cli.bench_options import Save, describe_machine
from minipaged.cli.options import AsJson


def engine(
    *,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Engine to compare with: vllm, openvino, llama.cpp or transformers; with :half, "
            "in half precision; or minipaged:half, with weights in float16. Can be repeated."
        ),
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option(
            help="Folder with an environment per engine. Default: ~/.cache/minipaged/peers."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    quick: Annotated[
        bool, typer.Option("--quick", help="Use a tiny model, to try out the command.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Runs per candidate, in turn.", min=1)] = 3,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each. Default: torch's choice.", min=1)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot tokens per second to this PNG.")] = None,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Measure the whole engine on a CPU. Takes minutes."""
    from minipaged.cli.bench_serve import report_tables
    from minipaged.evaluation.bench import engine as engines
    from minipaged.evaluation.bench import engine_process as processes
    from minipaged.evaluation.bench import engine_report as results
    from minipaged.evaluation.bench import engine_workload as workloads

    results.refuse_what_cannot_be(dtype, save, plot)
    environments = (peers or processes.DEFAULT_FOLDER).expanduser().absolute()
    chosen = processes.read_peers(against or [], environments)
    workload = workloads.QUICK if quick else workloads.FULL
    rows: list[results.Row] = []
    try:
        for row in engines.measure(workload, dtype, rounds, chosen, threads, environments):
            rows.append(row)
    finally:  # a run that is interrupted reports the cases that it has finished
        if rows:
            report_tables(
                {"rows": [asdict(row) for row in rows]},
                [results.as_table(rows), *results.failures(rows)],
                results.describe(workload, dtype, rounds, rows),
                describe_machine("cpu"),
                save,
                as_json,
            )
    if plot is not None:
        results.plot_rows(rows, plot)
