"""`minipaged bench ranks`: tensor parallelism on the CPUs of one machine."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from minipaged.cli.bench_options import Save, describe_machine
from minipaged.cli.options import AsJson
from minipaged.utils.progress import progress_bar


def ranks(
    *,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Number of ranks, which share the threads.", min=2)
    ] = 2,
    rounds: Annotated[int, typer.Option(help="Runs per candidate, in turn.", min=1)] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use a tiny model, to try out the command.")
    ] = False,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Compare several ranks with one process on CPUs. Takes minutes.

    Runs on Linux only.
    """
    from minipaged.cli.bench_serve import report_tables
    from minipaged.errors import InvalidOption
    from minipaged.evaluation.bench import ranks as ours

    if sys.platform != "linux":
        raise InvalidOption("bench ranks reads memory use from /proc: run it on Linux.")
    with progress_bar(desc="runs") as bar:
        found = ours.measure(tensor_parallel_size, rounds, quick, bar.update)
    note = (
        "Decoding with random weights: tokens per second of one process with all threads and of "
        f"{tensor_parallel_size} ranks that share the threads. Both generated the same tokens."
    )
    report_tables(
        {"rows": [asdict(row) for row in found.rows], "memory": [asdict(m) for m in found.memory]},
        ours.as_tables(found),
        note,
        describe_machine("cpu"),
        save,
        as_json,
    )
