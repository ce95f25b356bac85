"""Runs a command: sets up streams, and reports user errors in one sentence."""

import io
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from minipaged.cli.options import in_words_of_the_shell
from minipaged.errors import MinipagedError


def run(app: typer.Typer) -> NoReturn:
    """Run the requested command. A user error prints one sentence and exits with code 2."""
    warnings.formatwarning = lambda message, *_: f"minipaged: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # print "?" for what a terminal cannot encode
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except MinipagedError as error:
        _fail(in_words_of_the_shell(str(error), _names_of_flags(typer.main.get_command(app))))
    except OSError as error:
        _fail(f"{error.filename or 'the output'}: {error.strerror}.")
    except NotImplementedError as error:
        if not str(error).startswith("your turn"):
            raise
        _fail(f"a function in your file is not implemented yet ({error}).")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        format_message: Callable[[], str] | None = getattr(error, "format_message", None)
        if format_message is None:  # a bug in the library: show the traceback
            raise
        _fail(format_message())  # from typer: an unknown option, a missing argument


def _fail(sentence: str) -> NoReturn:
    print(f"minipaged: {sentence}", file=sys.stderr)
    sys.exit(2)


def _names_of_flags(command: Any) -> set[str]:
    """The Python names of all options of a command and its subcommands."""
    names = {option.name for option in command.params if option.param_type_name == "option"}
    for below in getattr(command, "commands", {}).values():
        names |= _names_of_flags(below)
    return names
