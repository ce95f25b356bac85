"""`minipaged serve`: an OpenAI-compatible server."""

import os
from typing import Any

import typer

from minipaged.cli.fetch import offer_to_fetch
from minipaged.cli.options import Part, Trace, takes_engine_options, takes_flags
from minipaged.cli.session import Session
from minipaged.errors import InvalidOption
from minipaged.serving.settings import SERVER_OPTIONS, ServerArgs


@takes_engine_options()
@takes_flags("server", SERVER_OPTIONS)
def serve(
    *, server: dict[str, Any], options: dict[str, Any], part: Part = None, trace: Trace = None
) -> None:
    """Serve a model through an OpenAI-compatible API.

    Runs until Ctrl-C or SIGTERM. It then refuses new requests (503) and gives running ones --grace
    seconds to finish. A second signal stops it at once.
    """
    server["api_key"] = server["api_key"] or os.environ.get("MINIPAGED_API_KEY")
    args = ServerArgs(**server)
    with Session(show_blocks=False, trace=trace, live=False) as session:
        try:
            from minipaged.serving import run
        except ModuleNotFoundError as error:
            raise InvalidOption(
                f"the server needs {error.name}, which is not installed: pip install "
                '"minipaged[serve]".'
            ) from error
        offer_to_fetch(options["model"])
        llm = session.load(options, part, is_traced=args.viz)
        code = run.serve(llm, args, session.log)
    raise typer.Exit(code)
