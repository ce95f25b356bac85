"""The command line: `minipaged demo | generate | chat | paper | simulate | plan | bench ...`.

Mistakes end with one sentence on standard error and exit code 2. torch is imported only once a
command runs, so that `--help` answers at once.
"""

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from minipaged.cli import fetch as fetch_command
from minipaged.cli.bench import app as bench
from minipaged.cli.capacity import plan
from minipaged.cli.entry import run
from minipaged.cli.generate import print_completions, read_lines, warn_of_an_early_end
from minipaged.cli.lab import app as lab
from minipaged.cli.options import (
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
    Swap,
    Trace,
    Version,
)
from minipaged.cli.paper import paper
from minipaged.cli.session import Session
from minipaged.cli.simulate import simulate
from minipaged.cli.trace import app as trace_app
from minipaged.errors import InvalidOption, InvalidRequest

if TYPE_CHECKING:
    from minipaged.sampling import BeamSearchParams, SamplingParams

app = typer.Typer(
    help="PagedAttention, the system behind vLLM, from scratch.",
    rich_markup_mode=None,  # plain help: it is read in scripts too
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench, name="bench")
app.add_typer(lab, name="lab")
app.add_typer(trace_app, name="trace")


def main() -> None:
    """The entry point."""
    run(app)


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
    swap: Swap = None,
    show_blocks: ShowBlocks = False,
    as_json: AsJson = False,
    trace: Trace = None,
) -> None:
    """Eight questions about eight stories, answered together by the embedded model."""
    with Session(show_blocks, trace, live=not as_json) as session:
        from minipaged.cli import demo as eight
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
            swap=swap,
        )
        tokenizer = llm.get_tokenizer()
        assert tokenizer is not None, "the embedded model has a tokenizer"
        cases = eight.make_cases(tokenizer, seed)
        board = eight.Scoreboard(cases, llm.engine.scheduler)
        eight.refuse_too_small_a_pool(cases, num_blocks, block_size)
        if not as_json:
            about, example = eight.introduction(cases, num_blocks, block_size)
            session.console.print(about, "", Text(example, style="dim"), "", sep="\n")
        start = time.perf_counter()
        with session.watch(None if as_json else board):
            greedy = SamplingParams(temperature=0.0, max_tokens=eight.MAX_ANSWER)
            for index, output in llm.stream([case.prompt for case in cases], greedy):
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
    swap: Swap = None,
    show_blocks: ShowBlocks = False,
    as_json: AsJson = False,
    trace: Trace = None,
) -> None:
    """Go on from one or more prompts, all together."""
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
            swap=swap,
        )
        texts = [line for text in prompts for line in read_lines(text)]
        if not texts:
            raise InvalidRequest("there is no prompt on standard input: give a line or more.")
        with session.watch(None), SharingMeter(llm.engine) as meter:
            outputs = llm.generate(list(texts), params, use_tqdm=not (as_json or show_blocks))
        for output in outputs:
            warn_of_an_early_end(output, max_tokens)
            if as_json:
                print(json.dumps(asdict(output)))
                continue
            saved = meter.saved(output.request_id)
            print_completions(session.console, output, saved)


def _beams_instead_of(params: "SamplingParams", beam_width: int) -> "BeamSearchParams":
    """Beam search as long as these samples. Raises InvalidOption if they ask for what it lacks."""
    from minipaged.sampling import BeamSearchParams, SamplingParams

    max_tokens, ignore_eos = params.max_tokens, params.ignore_eos
    if params != SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos):
        raise InvalidOption(
            "beam search draws nothing and looks for no text: with beam_width, leave out --n, "
            "best_of, --temperature, top_p, top_k and --stop."
        )
    return BeamSearchParams(beam_width, max_tokens, ignore_eos=ignore_eos)


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
    swap: Swap = None,
    show_blocks: ShowBlocks = False,
    as_json: AsJson = False,
    trace: Trace = None,
) -> None:
    """Talk with a model, a line a turn; an empty line ends it.

    The embedded model answers questions about a story. Without --system it is told one, which is
    shown, and another for another --seed.
    """
    with Session(show_blocks, trace, live=show_blocks and not as_json) as session:
        from minipaged.cli.chat import converse
        from minipaged.evaluation.stories import tell
        from minipaged.sampling import SamplingParams

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
            swap=swap,
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
