"""What `minipaged generate` reads and prints."""

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from minipaged.engine.outputs import RequestOutput


def print_completions(console: Console, output: RequestOutput, blocks_saved: float) -> None:
    """The prompt and what follows it, once for each sample or beam.

    Args:
        blocks_saved: the part of its blocks that sharing saved, 0 to 1.
    """
    for number, completion in enumerate(output.outputs, start=1):
        several = f"[{number} of {len(output.outputs)}] " if len(output.outputs) > 1 else ""
        text = Text(f"{several}{output.prompt or ''}", style="dim")
        text.append(completion.text, style="not dim")
        console.print(text, soft_wrap=True)
    if len(output.outputs) > 1:
        saved = f"sharing saved {blocks_saved:.0%} of the blocks"
        print(f"({saved}, over all steps)", file=sys.stderr)


def warn_of_an_early_end(output: RequestOutput, max_tokens: int) -> None:
    """Say on standard error that a completion is shorter than it was meant to be."""
    completion = output.outputs[0]
    if completion.finish_reason == "length" and len(completion.token_ids) < max_tokens:
        print(
            f"minipaged: {output.prompt!r} ended after {len(completion.token_ids)} of {max_tokens} "
            "tokens: the pool or the model's context is full.",
            file=sys.stderr,
        )


def read_lines(prompt: str) -> Iterator[str]:
    """ "-" stands for the lines of standard input."""
    if prompt != "-":
        yield prompt
        return
    yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
