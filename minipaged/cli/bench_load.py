"""The options of `minipaged bench serve`: which are refused, and how text is parsed."""

from importlib.util import find_spec
from math import inf, isnan
from pathlib import Path
from typing import Any

import typer

from minipaged.cli.options import refuse_beside, refuse_without
from minipaged.config import OPTIONS
from minipaged.errors import InvalidOption

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "h11")
PICTURES = (".png", ".svg", ".pdf")
OF_A_LOAD = (
    *("request_rate", "concurrency", "trace", "speed_up", "keep_alive", "give_up"),
    *("slo_ttft_ms", "slo_tpot_ms"),
)
OF_LENGTHS = ("input_len", "output_len", "spread")
OF_A_SERVER = tuple(name for name in OPTIONS if name not in ("seed", "model"))
NEEDS = {  # options by the one that they belong to
    "trace": ("speed_up",),
    "url": ("api_key",),
    "against_offline": ("rounds",),
    "figure_12": ("seconds",),
}


def refuse_what_cannot_be(context: typer.Context) -> None:
    """Raise InvalidOption for options that have no effect, and for packages that are missing."""
    given = context.params
    if given["figure_12"]:
        own = ("url", "api_key", "model", "num_requests", *OF_LENGTHS, "shared_prefix")
        own += ("vocab_size", "against_offline", *OF_A_LOAD, *OF_A_SERVER)
        refuse_beside(context, "--figure-12", "uses its own requests and servers", own)
    if given["against_offline"]:
        own = ("url", "api_key", "request_rates", "plot", *OF_A_LOAD)
        refuse_beside(context, "--against-offline", "sends all requests of a round at once", own)
    if given["url"] is not None:
        does = "names a running server, which has its own options"
        refuse_beside(context, "--url", does, OF_A_SERVER)
    if given["trace"] is not None:
        own = ("request_rate", "request_rates", *OF_LENGTHS)
        refuse_beside(context, "--trace", "sets arrivals and lengths", own)
    if given["concurrency"] is not None:
        own = ("request_rate", "request_rates", "give_up", "speed_up")
        refuse_beside(context, "--concurrency", "sends a request whenever another one ends", own)
    for name, of_it in NEEDS.items():
        if given[name] in (None, False):
            refuse_without(context, "--" + name.replace("_", "-"), of_it)
    _refuse_plot(given)
    missing = [name for name in (NEEDED if given["url"] is None else ("h11",)) if not _has(name)]
    if missing:
        raise InvalidOption(
            f"bench serve needs packages that are not installed ({', '.join(missing)}): pip "
            'install "minipaged[serve]".'
        )


def _has(package: str) -> bool:
    return find_spec(package) is not None


def _refuse_plot(given: dict[str, Any]) -> None:
    for file in (given["save"], given["plot"]):
        if file is not None and not file.parent.is_dir():
            raise InvalidOption(f"there is no folder {file.parent} for {file.name}: create it.")
    plot: Path | None = given["plot"]
    if plot is None:
        return
    if plot.suffix not in PICTURES:
        raise InvalidOption(f"--plot is {plot}: give a file that ends in {', '.join(PICTURES)}.")
    if given["request_rates"] is None and not given["figure_12"]:
        raise InvalidOption("--plot shows several request rates: give them with --request-rates.")
    if not _has("matplotlib"):
        raise InvalidOption("--plot needs matplotlib: pip install 'minipaged[plot]'.")


def read_rates(one: float | None, several: str | None) -> list[float]:
    """Requests per second; inf is all at once. Raises InvalidOption."""
    if several is None:
        rates = [inf if one is None else one]
    elif one is not None:
        raise InvalidOption("--request-rate and --request-rates exclude each other: give one.")
    else:
        try:
            rates = [float(each) for each in several.split(",")]
        except ValueError as error:
            raise InvalidOption(
                f"--request-rates is {several!r}: give numbers with commas between them, 1,2,4."
            ) from error
    if any(isnan(rate) or rate <= 0 for rate in rates):
        raise InvalidOption("a request rate must be above 0 requests per second, or inf.")
    if several is not None and inf in rates:
        raise InvalidOption("--request-rates cannot contain inf: leave it out to send all at once.")
    return rates


def read_groups(text: str | None) -> tuple[int, int]:
    """Groups and tokens of "8x100"; (0, 0) without it. Raises InvalidOption."""
    if text is None:
        return 0, 0
    groups, times, tokens = text.partition("x")
    if not (times and groups.isdecimal() and tokens.isdecimal() and int(groups) and int(tokens)):
        raise InvalidOption(
            f"--shared-prefix is {text!r}: give groups x tokens, for example 8x100."
        )
    return int(groups), int(tokens)
