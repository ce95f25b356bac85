"""The command line: `minipaged demo | generate | chat`.

Mistakes end with one sentence on standard error and exit code 2. torch is imported only once a
command runs, so that `--help` answers at once.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from minipaged.errors import MinipagedError
from minipaged.terminal import Session
from minipaged.version import __version__

app = typer.Typer(
    help="PagedAttention, the system behind vLLM, from scratch.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: it is read in scripts too
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="storyteller, or a folder with a checkpoint.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Backend = Annotated[str, typer.Option(help="auto, reference, blockwise or torch.")]
BlockSize = Annotated[int, typer.Option(help="Token slots in a block.")]
NumBlocks = Annotated[int | None, typer.Option(help="Blocks in the pool; default: ample.")]
Preemption = Annotated[str, typer.Option(help="auto, recompute or swap.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
ShowBlocks = Annotated[bool, typer.Option("--show-blocks", help="Draw the pool live.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Trace = Annotated[Path | None, typer.Option(help="Write every event to this file, as JSON lines.")]


def main() -> None:
    """The entry point: runs a command and turns mistakes into one sentence and exit code 2."""
    # Before torch is imported: threads that wait shall sleep. Spinning, they hold up each other
    # whenever the machine does something else too, and a step takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except MinipagedError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}.")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        format_message: Callable[[], str] | None = getattr(error, "format_message", None)
        if format_message is None:  # a fault of ours: show where
            raise
        _fail(format_message())  # typer's own: an unknown option, a missing argument


def _fail(sentence: str) -> None:
    print(f"minipaged: {sentence}", file=sys.stderr)
    sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"minipaged {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """PagedAttention, the system behind vLLM, from scratch."""


# ---- demo ----------------------------------------------------------------------------------------


@app.command()
def demo(
    device: Device = "auto",
    attention_backend: Backend = "auto",
    block_size: BlockSize = 16,
    num_blocks: Annotated[int, typer.Option(help="Blocks in the pool.")] = 128,
    preemption: Preemption = "auto",
    seed: Seed = 0,
    show_blocks: ShowBlocks = False,
    as_json: AsJson = False,
    trace: Trace = None,
) -> None:
    """Eight questions about eight stories, answered together by the embedded model."""
    with Session(show_blocks, trace, live=not as_json) as session:
        from minipaged.demo import Scoreboard, make_cases
        from minipaged.sampling import SamplingParams

        llm = session.load(
            device=device,
            attention_backend=attention_backend,
            block_size=block_size,
            num_blocks=num_blocks,
            preemption=preemption,
            max_num_batched_tokens=256,  # several steps of prompt chunks, for the eye
            seed=seed,
        )
        tokenizer = llm.get_tokenizer()
        assert tokenizer is not None, "the embedded model has a tokenizer"
        board = Scoreboard(make_cases(tokenizer, seed))
        greedy = SamplingParams(temperature=0.0, max_tokens=32)
        start = time.perf_counter()
        with session.watch(None if as_json else board):
            for index, output in llm.stream([case.prompt for case in board.cases], greedy):
                board.update(index, output)
        seconds = time.perf_counter() - start

        read = sum(case.num_tokens for case in board.cases)
        if as_json:
            answers = board.as_dict()
            report = {"right": board.num_right, "of": len(answers), "seconds": round(seconds, 3)}
            print(json.dumps({**report, "answers": answers}))
            return
        session.console.print(
            f"\n{board.num_right} of {len(board.cases)} right; {read} prompt tokens read and "
            f"{board.num_generated} generated in {seconds:.1f} s "
            f"({(read + board.num_generated) / seconds:.0f} tokens/s)"
        )


# ---- generate ------------------------------------------------------------------------------------


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help='One or more prompts; "-" reads lines.')],
    model: Model = "storyteller",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate a prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Probability to draw from.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens to draw from; 0: all.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to the limit.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention_backend: Backend = "auto",
    block_size: BlockSize = 16,
    num_blocks: NumBlocks = None,
    preemption: Preemption = "auto",
    seed: Seed = 0,
    show_blocks: ShowBlocks = False,
    as_json: AsJson = False,
    trace: Trace = None,
) -> None:
    """Go on from one or more prompts, all together."""
    with Session(show_blocks, trace, live=not as_json) as session:
        from minipaged.sampling import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        llm = session.load(
            model=model,
            device=device,
            dtype=dtype,
            attention_backend=attention_backend,
            block_size=block_size,
            num_blocks=num_blocks,
            preemption=preemption,
            seed=seed,
        )
        texts = [line for text in prompts for line in _lines(text)]
        with session.watch(None):
            outputs = llm.generate(list(texts), params, use_tqdm=not (as_json or show_blocks))
        for output in outputs:
            if as_json:
                print(json.dumps(asdict(output)))
            else:
                session.console.print(output.prompt, style="dim", end="", markup=False)
                session.console.print(output.outputs[0].text, markup=False, highlight=False)


def _lines(prompt: str) -> Iterator[str]:
    """ "-" stands for the lines of standard input."""
    if prompt != "-":
        yield prompt
        return
    yield from (line.rstrip("\n") for line in sys.stdin if line.strip())


# ---- chat ----------------------------------------------------------------------------------------


@app.command()
def chat(
    model: Model = "storyteller",
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens in an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention_backend: Backend = "auto",
    seed: Seed = 0,
    show_blocks: ShowBlocks = False,
    trace: Trace = None,
) -> None:
    """Talk with a model, a line a turn; an empty line ends it.

    The embedded model answers questions about a story. Without --system it is told one, which is
    shown, and another for another --seed.
    """
    with Session(show_blocks, trace, live=False) as session:
        from minipaged.chat import Message, render_chat
        from minipaged.sampling import SamplingParams
        from minipaged.stories import tell

        params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
        llm = session.load(
            model=model,
            device=device,
            dtype=dtype,
            attention_backend=attention_backend,
            seed=seed,
        )
        if system is None and model == "storyteller":
            system = tell(num_facts=6, seed=seed).text
        messages: list[Message] = []
        if system is not None:
            session.console.print(system, style="dim", markup=False, highlight=False)
            messages.append({"role": "system", "content": system})
        while line := _ask():
            messages.append({"role": "user", "content": line})
            shown = ""
            with session.watch(None):
                for _, output in llm.stream(render_chat(llm.folder, messages), params):
                    text = output.outputs[0].text
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
            print()
            messages.append({"role": "assistant", "content": shown})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
