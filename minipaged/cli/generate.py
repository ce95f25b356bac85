"""`minipaged generate`: completes one or more prompts."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from minipaged.cli.fetch import offer_to_fetch
from minipaged.cli.options import AsJson, Part, ShowBlocks, Trace, takes_engine_options
from minipaged.cli.session import Session
from minipaged.engine.outputs import RequestOutput
from minipaged.errors import InvalidOption, InvalidRequest

if TYPE_CHECKING:
    from minipaged.sampling import BeamSearchParams, SamplingParams


@takes_engine_options()
def generate(
    *,
    prompts: Annotated[
        list[str], typer.Argument(help='Prompts; "-" reads one per line from standard input.')
    ],
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens to generate per prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens up to this total probability.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Sample from the K most likely tokens; 0 means all.")
    ] = 0,
    n: Annotated[int, typer.Option(help="Samples per prompt.")] = 1,
    best_of: Annotated[
        int | None, typer.Option(help="Generate this many samples and keep the n most likely.")
    ] = None,
    beam_width: Annotated[
        int | None, typer.Option(help="Use beam search with this many beams.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop when this text is generated. Repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue past the end-of-text token.")
    ] = False,
    options: dict[str, Any],
    part: Part = None,
    show_blocks: ShowBlocks = False,
    as_json: AsJson = False,
    trace: Trace = None,
) -> None:
    """Complete one or more prompts in one batch."""
    with Session(show_blocks, trace, live=not as_json) as session:
        from minipaged.evaluation.bench.sharing import SharingMeter
        from minipaged.sampling import SamplingParams

        params = SamplingParams(
            n=n,
            best_of=best_of,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        params = params if beam_width is None else _beams_instead_of(params, beam_width)
        offer_to_fetch(options["model"])
        llm = session.load(options, part)
        texts = [line for text in prompts for line in read_lines(text)]
        if not texts:
            raise InvalidRequest("standard input contains no prompt: give at least one line.")
        with session.watch(None), SharingMeter(llm.engine) as meter:
            outputs = llm.generate(list(texts), params, use_tqdm=not (as_json or show_blocks))
        for output in outputs:
            warn_of_an_early_end(output, max_tokens)
            if as_json:
                print(json.dumps(asdict(output)))
                continue
            print_completions(session.console, output, meter.saved(output.request_id))


def _beams_instead_of(params: "SamplingParams", beam_width: int) -> "BeamSearchParams":
    """Beam search with the same limits. Raises InvalidOption for what it does not support."""
    from minipaged.sampling import BeamSearchParams, SamplingParams

    max_tokens, ignore_eos = params.max_tokens, params.ignore_eos
    if params != SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos):
        raise InvalidOption(
            "beam search does not sample and has no stop texts: with beam_width, leave out --n, "
            "best_of, --temperature, top_p, top_k and --stop."
        )
    return BeamSearchParams(beam_width, max_tokens, ignore_eos=ignore_eos)


def print_completions(console: Console, output: RequestOutput, blocks_saved: float) -> None:
    """Print the prompt with each of its samples or beams.

    Args:
        blocks_saved: the fraction of its blocks that sharing saved, 0 to 1.
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
    """Warn on standard error about a completion that is shorter than requested."""
    completion = output.outputs[0]
    if completion.finish_reason == "length" and len(completion.token_ids) < max_tokens:
        print(
            f"minipaged: {output.prompt!r} ended after {len(completion.token_ids)} of {max_tokens} "
            "tokens: the pool or the model's context is full.",
            file=sys.stderr,
        )


def read_lines(prompt: str) -> Iterator[str]:
    """The prompt itself or, for "-", the lines of standard input."""
    if prompt != "-":
        yield prompt
        return
    yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
