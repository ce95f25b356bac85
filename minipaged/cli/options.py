"""The flags that several commands share.

A flag for an engine option is made from the option's declaration in `EngineArgs`: its type, default
and help text are not repeated here.
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
    """Give a command one flag per engine option, and pass them on as its argument `options`.

    Args:
        leave_out: options that this command sets itself.
        defaults: what this command has as a default instead of the declared one.
    """
    taken = {name: each for name, each in OPTIONS.items() if name not in leave_out}
    return takes_flags("options", taken, **defaults)


def takes_flags(
    argument: str, taken: Mapping[str, Option], **defaults: Any
) -> Callable[[Command], Command]:
    """Give a command one flag per declared option, and pass them on as one argument, a dict."""

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
    """The type to which the command line converts an option; its value is checked later."""
    is_text = get_origin(declared.type) is Literal or not isinstance(declared.type, type)
    kind: Any = str if is_text else declared.type
    return kind | NoneType if declared.may_be_none else kind


def in_words_of_the_shell(sentence: str, names: Iterable[str]) -> str:
    """Options by the names of their flags: num_blocks is --num-blocks.

    Names of one word stay: they may be words of the sentence. `name=value` is a flag in any case.
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
    """Refuse flags that another one makes pointless, whatever their values.

    Args:
        context: of the command that is running.
        flag: the other one, as it is typed; call this only if it was given.
        does: what it does, with the flag as subject.
        ignored: names of parameters of the command.

    Raises:
        InvalidOption: one of them was given on the command line.
    """
    flags = {each.name: each.opts[0] for each in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in ignored}
    given = [flags[n] for n, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        names = " and ".join([", ".join(given[:-1])] * (len(given) > 1) + given[-1:])
        them = "it" if len(given) == 1 else "them"
        raise InvalidOption(
            f"{flag} {does}, so {names} would be ignored: leave {them} out, or leave out {flag}."
        )


# ---- flags for simulated hardware ----------------------------------------------------------------

LinkBandwidth = Annotated[
    float | None,
    typer.Option(help="GB per second that each GPU sends to the others. Default: its own link's."),
]
LinkLatency = Annotated[
    float | None,
    typer.Option(help="Microseconds per all-reduce or gather, besides. Default: its own link's."),
]


def with_link(
    server: "Deployment", link_bandwidth: float | None, link_latency: float | None
) -> "Deployment":
    """The server with the link of the two flags, where they were given.

    Raises:
        InvalidOption: a value is impossible, or the server has a single GPU.
    """
    if link_bandwidth is not None and not (link_bandwidth > 0 and isfinite(link_bandwidth)):
        raise InvalidOption(f"--link-bandwidth is {link_bandwidth:g}: give a number above 0.")
    if link_latency is not None and not (link_latency >= 0 and isfinite(link_latency)):
        raise InvalidOption(f"--link-latency is {link_latency:g}: give a number from 0 up.")
    link = server.gpu.link
    if link_bandwidth is not None:
        link = replace(link, bandwidth=link_bandwidth * 1e9)
    if link_latency is not None:
        link = replace(link, latency=link_latency * 1e-6)
    if (link_bandwidth, link_latency) != (None, None) and server.num_gpus == 1:
        raise InvalidOption(
            "--link-bandwidth and --link-latency connect several GPUs, and this server has one: "
            "leave them out, or choose a server with more GPUs."
        )
    return server.with_link(link)


# ---- other flags ---------------------------------------------------------------------------------

BlockSize = Annotated[int, engine_flag("block_size")]
Device = Annotated[str, engine_flag("device")]
Seed = Annotated[int, engine_flag("seed")]
MaxNumSeqs = Annotated[int, engine_flag("max_num_seqs")]
ShowBlocks = Annotated[bool, typer.Option("--show-blocks", help="Draw the block pool live.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
Trace = Annotated[Path | None, typer.Option(help="Write every event to this file as JSON lines.")]
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
