"""The flags that several commands share.

The flag for an engine option is derived from the option's declaration in `EngineArgs`, which holds
its type, default and help text.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin

import typer

from minipaged import __version__
from minipaged.config import OPTIONS
from minipaged.errors import InvalidOption
from minipaged.utils.options import Option

if TYPE_CHECKING:
    from minipaged.evaluation.sim.catalogue import Deployment

Command = Callable[..., None]


# ---- flags for engine options --------------------------------------------------------------------


def engine_flag(name: str) -> Any:
    """The flag for one engine option, for `Annotated`."""
    return _flag(OPTIONS[name])


def takes_engine_options(
    leave_out: tuple[str, ...] = (), **defaults: Any
) -> Callable[[Command], Command]:
    """Add one flag per engine option to a command, which gets the values as its `options`.

    Args:
        leave_out: options that this command sets itself.
        defaults: defaults of this command that replace the declared ones.
    """
    taken = {name: each for name, each in OPTIONS.items() if name not in leave_out}
    return takes_flags("options", taken, **defaults)


def takes_flags(
    argument: str, taken: Mapping[str, Option], **defaults: Any
) -> Callable[[Command], Command]:
    """Add one flag per declared option to a command, which gets the values as one dict."""

    def decorate(command: Command) -> Command:
        parameters = dict(inspect.signature(command).parameters)
        flags = {
            name: inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, each.default),
                annotation=Annotated[_shell_type(each), _flag(each)],
            )
            for name, each in taken.items()
        }

        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in flags}
            command(**given, **{argument: options})

        every = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in parameters.items()
            for each in (flags.values() if name == argument else [parameter])
        ]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(every)  # pyright: ignore[reportFunctionMemberAccess]
        return run

    return decorate


def _flag(declared: Option) -> Any:
    return typer.Option(help=in_words_of_the_shell(declared.description, OPTIONS))


def _shell_type(declared: Option) -> Any:
    """The type that the command line converts a value to. The value is checked later."""
    is_text = get_origin(declared.type) is Literal or not isinstance(declared.type, type)
    kind: Any = str if is_text else declared.type
    return kind | NoneType if declared.may_be_none else kind


def in_words_of_the_shell(sentence: str, names: Iterable[str]) -> str:
    """Replace option names by their flags: num_blocks becomes --num-blocks.

    Names of one word stay, because they may be ordinary words. `name=value` always becomes a flag.
    """

    def flag(name: str) -> str:
        return "--" + name.replace("_", "-")

    for name in sorted(names, key=len, reverse=True):
        sentence = re.sub(rf"\b{name}=True\b", flag(name), sentence)
        sentence = re.sub(rf"\b{name}=False\b", flag(f"no_{name}"), sentence)
        sentence = re.sub(rf"\b{name}=(['\"]?)([\w.-]+)\1", rf"{flag(name)} \2", sentence)
        if "_" in name:
            sentence = re.sub(rf"(?<!-)\b{name}\b", flag(name), sentence)
    return sentence


def refuse_beside(context: typer.Context, flag: str, does: str, ignored: Iterable[str]) -> None:
    """Refuse flags that would have no effect because another flag was given.

    Args:
        context: of the command that is running.
        flag: the other flag, as typed. Call this function only if it was given.
        does: what that flag does, as the rest of a sentence that starts with it.
        ignored: the Python names of the flags that it makes pointless.

    Raises:
        InvalidOption: one of them was given on the command line.
    """
    if given := _given(context, ignored):
        them = "it" if len(given) == 1 else "them"
        raise InvalidOption(
            f"{flag} {does}, so {_joined(given)} would be ignored: leave {them} out, or leave out "
            f"{flag}."
        )


def refuse_without(context: typer.Context, flag: str, of_it: Iterable[str]) -> None:
    """Refuse flags that have an effect only together with another flag, which was not given.

    Raises:
        InvalidOption: one of them was given on the command line.
    """
    if given := _given(context, of_it):
        have, them = ("has", "it") if len(given) == 1 else ("have", "them")
        raise InvalidOption(
            f"{_joined(given)} {have} no effect without {flag}: leave {them} out, or add {flag}."
        )


def _given(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of the flags that were typed, as they were typed."""
    flags = {each.name: each.opts[0] for each in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [flags[n] for n, source in sources.items() if source and source.name == "COMMANDLINE"]


def _joined(flags: list[str]) -> str:
    return " and ".join([", ".join(flags[:-1])] * (len(flags) > 1) + flags[-1:])


# ---- flags for simulated hardware ----------------------------------------------------------------

LinkBandwidth = Annotated[
    float | None,
    typer.Option(help="Link bandwidth per GPU, in GB per second. Default: the GPU's own link."),
]
LinkLatency = Annotated[
    float | None,
    typer.Option(help="Latency of a collective, in microseconds. Default: the GPU's own link."),
]


def with_link(
    server: "Deployment", link_bandwidth: float | None, link_latency: float | None
) -> "Deployment":
    """The server with the link that the two flags describe, where they were given.

    Raises:
        InvalidOption: a value is impossible, or the server has a single GPU.
    """
    if link_bandwidth is not None and not (link_bandwidth > 0 and isfinite(link_bandwidth)):
        raise InvalidOption(f"--link-bandwidth is {link_bandwidth:g}: give a number above 0.")
    if link_latency is not None and not (link_latency >= 0 and isfinite(link_latency)):
        raise InvalidOption(f"--link-latency is {link_latency:g}: give 0 or a number above.")
    link = server.gpu.link
    if link_bandwidth is not None:
        link = replace(link, bandwidth=link_bandwidth * 1e9)
    if link_latency is not None:
        link = replace(link, latency=link_latency * 1e-6)
    if (link_bandwidth, link_latency) != (None, None) and server.num_gpus == 1:
        raise InvalidOption(
            "--link-bandwidth and --link-latency describe links between GPUs, but this server has "
            "one GPU: leave them out, or choose a server with more."
        )
    return server.with_link(link)


# ---- other flags ---------------------------------------------------------------------------------

BlockSize = Annotated[int, engine_flag("block_size")]
Device = Annotated[str, engine_flag("device")]
Seed = Annotated[int, engine_flag("seed")]
MaxNumSeqs = Annotated[int, engine_flag("max_num_seqs")]
ShowBlocks = Annotated[bool, typer.Option("--show-blocks", help="Draw the block pool live.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
Trace = Annotated[
    Path | None, typer.Option(help="Record all events to this file, for `minipaged trace view`.")
]
Part = Annotated[
    list[str] | None,
    typer.Option(help="Use a custom part, for example allocator=mine.py:MyAllocator."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"minipaged {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]
