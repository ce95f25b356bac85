"""What is around every command: streams, threads, and mistakes told in one sentence."""

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from minipaged.cli.options import in_words_of_the_shell
from minipaged.errors import MinipagedError


def run(app: typer.Typer) -> NoReturn:
    """Run the command that was asked for, and turn mistakes into one sentence and exit code 2."""
    # Before torch is imported: threads that wait shall sleep. Spinning, they hold up each other
    # whenever the machine does something else too, and a step takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.formatwarning = lambda message, *_: f"minipaged: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a letter shows "?"
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except MinipagedError as error:
        _fail(in_words_of_the_shell(str(error), _names_of_flags(typer.main.get_command(app))))
    except OSError as error:
        _fail(f"{error.filename or 'the output'}: {error.strerror}.")
    except NotImplementedError as error:
        if not str(error).startswith("your turn"):
            raise
        _fail(f"a body in your file is still to be written ({error}).")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        format_message: Callable[[], str] | None = getattr(error, "format_message", None)
        if format_message is None:  # a fault of ours: show where
            raise
        _fail(format_message())  # typer's own: an unknown option, a missing argument


def _fail(sentence: str) -> NoReturn:
    print(f"minipaged: {sentence}", file=sys.stderr)
    sys.exit(2)


def _names_of_flags(command: Any) -> set[str]:
    """The names of all options of a command and the commands below it, as Python has them."""
    names = {option.name for option in command.params if option.param_type_name == "option"}
    for below in getattr(command, "commands", {}).values():
        names |= _names_of_flags(below)
    return names
