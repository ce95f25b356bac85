"""What is around every command: streams, threads, and mistakes told in one sentence."""

import io
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import typer

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
        _fail(_in_words_of_the_shell(str(error)))
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


def _in_words_of_the_shell(sentence: str) -> str:
    """Options by the names they have here: num_blocks is --num-blocks."""
    names = "attention_backend kv_cache_dtype best_of beam_width block_size num_blocks max_tokens"
    any_of_them = rf"\b({'|'.join([*names.split(), 'top_p', 'top_k'])})\b"
    return re.sub(any_of_them, lambda name: "--" + name[0].replace("_", "-"), sentence)
