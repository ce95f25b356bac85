"""`minipaged lab route`: a student's router in front of real servers."""

from pathlib import Path
from typing import Annotated

import typer

from minipaged.engine.custom_parts import find_in_file
from minipaged.errors import InvalidOption
from minipaged.labs.lab10_router import LAB
from minipaged.labs.routing.load import RoundRobin, Router
from minipaged.utils.options import require_whole


def route(
    file: Annotated[Path, typer.Argument(help="Your file.")] = Path(LAB.file_name),
    server: Annotated[
        list[str] | None, typer.Option(help="Address of a server, http://host:port. Repeatable.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free one.")] = 8000,
    capacity: Annotated[
        int, typer.Option(help="Assumed cache size of a server, in pieces of 16 characters.")
    ] = 10_000,
    slack: Annotated[
        int, typer.Option(help="Open requests that a server may have above the least loaded one.")
    ] = 4,
    round_robin: Annotated[
        bool, typer.Option("--round-robin", help="Baseline: send to the servers in turn.")
    ] = False,
) -> None:
    """Lab 10: run your router in front of several servers.

    It runs on this machine until Ctrl-C.
    """
    require_whole("capacity", capacity, 1)
    require_whole("slack", slack, 0)
    require_whole("port", port, 0)
    if not server:
        raise InvalidOption(
            "no server was given: start some, for example with `minipaged serve --port 8001`, and "
            "pass each as --server http://127.0.0.1:8001."
        )
    router: Router = RoundRobin(len(server))
    if not round_robin:
        if not file.is_file():
            raise InvalidOption(
                f"there is no {file}: begin with `minipaged lab start {LAB.number}`."
            )
        router = find_in_file(file, "PrefixRouter")(len(server), capacity=capacity, slack=slack)
    try:
        from minipaged.labs.routing.running import run
    except ModuleNotFoundError as error:
        raise InvalidOption(
            f"the router needs {error.name}, which is not installed: pip install "
            '"minipaged[serve]".'
        ) from error
    run(router, server, port)
