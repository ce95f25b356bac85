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
        int, typer.Option(help="Ranks, each with a share of the threads.", min=2)
    ] = 2,
    rounds: Annotated[int, typer.Option(help="Runs of each side, alternating.", min=1)] = 5,
    quick: Annotated[bool, typer.Option(help="Use a tiny model, to try the command.")] = False,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Several ranks against one process on CPUs. Takes minutes; Linux only."""
    from minipaged.cli.bench_serve import report_tables
    from minipaged.errors import InvalidOption
    from minipaged.evaluation.bench import ranks as ours

    if sys.platform != "linux":
        raise InvalidOption("memory is read from /proc: run this on Linux.")
    with progress_bar(desc="runs") as bar:
        found = ours.measure(tensor_parallel_size, rounds, quick, bar.update)
    note = (
        "Decoding with random weights: tokens per second of one process with all threads and of "
        f"{tensor_parallel_size} ranks that share them. Both sides generated the same tokens."
    )
    report_tables(
        {"rows": [asdict(row) for row in found.rows], "memory": [asdict(m) for m in found.memory]},
        ours.as_tables(found),
        note,
        describe_machine("cpu"),
        save,
        as_json,
    )
