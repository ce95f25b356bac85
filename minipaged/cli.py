"""The command line: `minipaged demo | generate | chat | paper | simulate | plan | bench ...`.

Mistakes end with one sentence on standard error and exit code 2. torch is imported only once a
command runs, so that `--help` answers at once.
"""

import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from minipaged import fetch_command
from minipaged.bench.commands import app as bench
from minipaged.errors import InvalidOption, InvalidRequest, MinipagedError
from minipaged.options import (
    AsJson,
    Backend,
    BlockSize,
    Device,
    Dtype,
    KVDtype,
    Memory,
    Model,
    NumBlocks,
    Preemption,
    Seed,
    ShowBlocks,
    Trace,
    Version,
)
from minipaged.paper.command import paper
from minipaged.show import print_completions, read_lines, warn_of_an_early_end
from minipaged.sim.command import plan
from minipaged.sim.compare import simulate
from minipaged.terminal import Session
from minipaged.trace_command import app as trace_app

app = typer.Typer(
    help="PagedAttention, the system behind vLLM, from scratch.",
    rich_markup_mode=None,  # plain help: it is read in scripts too
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench, name="bench")
app.add_typer(trace_app, name="trace")


def main() -> None:
    """The entry point: runs a command and turns mistakes into one sentence and exit code 2."""
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


def _in_words_of_the_shell(sentence: str) -> str:
    """Options by the names they have here: num_blocks is --num-blocks."""
    names = "attention_backend kv_cache_dtype best_of beam_width block_size num_blocks max_tokens"
    any_of_them = rf"\b({'|'.join([*names.split(), 'top_p', 'top_k'])})\b"
    return re.sub(any_of_them, lambda name: "--" + name[0].replace("_", "-"), sentence)


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: Version = False,
) -> None:
    """PagedAttention, the system behind vLLM, from scratch."""
    if context.invoked_subcommand is None:
        print(context.get_help())


# ---- demo ----------------------------------------------------------------------------------------


@app.command()
def demo(
    device: Device = "auto",
    attention_backend: Backend = "auto",
    memory: Memory = "paged",
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
        from minipaged import demo as eight
        from minipaged.sampling import SamplingParams

        llm = session.load(
            device=device,
            attention_backend=attention_backend,
            memory=memory,
            block_size=block_size,
            num_blocks=num_blocks,
            preemption=preemption,
            max_num_batched_tokens=256,  # several steps of prompt chunks, for the eye
            seed=seed,
        )
        tokenizer = llm.get_tokenizer()
        assert tokenizer is not None, "the embedded model has a tokenizer"
        board = eight.Scoreboard(eight.make_cases(tokenizer, seed))
        eight.refuse_too_small_a_pool(board.cases, num_blocks, block_size)
        session.log.listeners.append(board)
        if not as_json:
            about, example = eight.introduction(board.cases, num_blocks, block_size)
            session.console.print(about, "", Text(example, style="dim"), "", sep="\n")
        start = time.perf_counter()
        with session.watch(None if as_json else board):
            greedy = SamplingParams(temperature=0.0, max_tokens=eight.MAX_ANSWER)
            for index, output in llm.stream([case.prompt for case in board.cases], greedy):
                board.update(index, output)
        seconds = time.perf_counter() - start
        if as_json:
            answers = board.as_dict()
            report = {"right": board.num_right, "of": len(answers), "seconds": round(seconds, 3)}
            print(json.dumps({**report, "answers": answers}))
            return
        slots, longest = num_blocks * block_size, llm.engine.config.max_model_len
        summary = board.summary(seconds - session.seconds_watched, slots // longest, longest)
        session.console.print(f"\n{summary}", highlight=False)


# ---- generate ------------------------------------------------------------------------------------


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help='One or more prompts; "-" reads lines.')],
    model: Model = "storyteller",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate a prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Probability to draw from.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens to draw from; 0: all.")] = 0,
    n: Annotated[int, typer.Option(help="Samples of each prompt.")] = 1,
    best_of: Annotated[int | None, typer.Option(help="Samples to take the best n of.")] = None,
    beam_width: Annotated[int | None, typer.Option(help="Search with so many beams.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to the limit.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv_cache_dtype: KVDtype = "auto",
    attention_backend: Backend = "auto",
    memory: Memory = "paged",
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
        from minipaged.sampling import BeamSearchParams, SamplingParams

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
        if beam_width is not None:
            drawn = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
            if params != drawn:
                raise InvalidOption(
                    "beam search draws nothing and looks for no text: with beam_width, leave out "
                    "--n, best_of, --temperature, top_p, top_k and --stop."
                )
            params = BeamSearchParams(beam_width, max_tokens, ignore_eos=ignore_eos)
        fetch_command.offer_to_fetch(model)
        llm = session.load(
            model=model,
            device=device,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            attention_backend=attention_backend,
            memory=memory,
            block_size=block_size,
            num_blocks=num_blocks,
            preemption=preemption,
            seed=seed,
        )
        texts = [line for text in prompts for line in read_lines(text)]
        if not texts:
            raise InvalidRequest("there is no prompt on standard input: give a line or more.")
        with session.watch(None):
            outputs = llm.generate(list(texts), params, use_tqdm=not (as_json or show_blocks))
        for output in outputs:
            warn_of_an_early_end(output, max_tokens)
            if as_json:
                print(json.dumps(asdict(output)))
                continue
            print_completions(session.console, output)


# ---- chat ----------------------------------------------------------------------------------------


@app.command()
def chat(
    model: Model = "storyteller",
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens in an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv_cache_dtype: KVDtype = "auto",
    attention_backend: Backend = "auto",
    block_size: BlockSize = 16,
    num_blocks: NumBlocks = None,
    seed: Seed = 0,
    show_blocks: ShowBlocks = False,
    as_json: AsJson = False,
    trace: Trace = None,
) -> None:
    """Talk with a model, a line a turn; an empty line ends it.

    The embedded model answers questions about a story. Without --system it is told one, which is
    shown, and another for another --seed.
    """
    with Session(show_blocks, trace, live=show_blocks and not as_json) as session:
        from minipaged.sampling import SamplingParams
        from minipaged.stories import tell
        from minipaged.talk import converse

        params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
        fetch_command.offer_to_fetch(model)
        llm = session.load(
            model=model,
            device=device,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            attention_backend=attention_backend,
            block_size=block_size,
            num_blocks=num_blocks,
            seed=seed,
        )
        hint = ""
        if system is None and model == "storyteller":
            story = tell(num_facts=6, seed=seed)
            system, deed, animal = story.text, story.questions[0], story.questions[-2]
            hint = f'Ask as it was taught: "{deed.text}", "{animal.text}" and the like.'
        if system is not None and not as_json:
            session.console.print(Text(f"{system}\n{hint}".rstrip(), style="dim"))
        converse(llm, session, system, params, as_json)


# ---- the paper's figures, fetch and convert ------------------------------------------------------

app.command()(paper)
app.command()(simulate)
app.command()(plan)
app.command()(fetch_command.fetch)
app.command()(fetch_command.convert)
