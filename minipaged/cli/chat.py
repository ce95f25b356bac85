"""`minipaged chat`: a conversation in the terminal, one line per turn."""

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from minipaged.cli.fetch import offer_to_fetch
from minipaged.cli.options import AsJson, Part, ShowBlocks, Trace, takes_engine_options
from minipaged.cli.session import Session
from minipaged.errors import PromptTooLong
from minipaged.evaluation.stories import tell
from minipaged.tokenizer.chat_prompt import chat_prompt
from minipaged.tokenizer.chat_template import Message, read_template

if TYPE_CHECKING:
    from minipaged.llm import LLM
    from minipaged.sampling import SamplingParams


@takes_engine_options()
def chat(
    *,
    system: Annotated[
        str | None, typer.Option(help="System message, sent before the conversation.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens per answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    options: dict[str, Any],
    part: Part = None,
    show_blocks: ShowBlocks = False,
    as_json: AsJson = False,
    trace: Trace = None,
) -> None:
    """Chat with a model, one line per turn.

    An empty line ends the chat. The embedded model answers questions about a story. Without
    --system, it prints a story first; another --seed gives another story.
    """
    with Session(show_blocks, trace, live=show_blocks and not as_json) as session:
        from minipaged.sampling import SamplingParams

        params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
        offer_to_fetch(options["model"])
        llm = session.load(options, part)
        hint = ""
        if system is None and options["model"] == "storyteller":
            story = tell(num_facts=6, seed=options["seed"])
            system, deed, animal = story.text, story.questions[0], story.questions[-2]
            hint = f'Ask questions like "{deed.text}" and "{animal.text}".'
        if system is not None and not as_json:
            session.console.print(Text(f"{system}\n{hint}".rstrip(), style="dim"))
        converse(llm, session, system, params, as_json)


def converse(
    llm: "LLM", session: Session, system: str | None, params: "SamplingParams", as_json: bool
) -> None:
    """Read questions and print answers until an empty line or the end of the input.

    Raises CheckpointError before the first question if the model has no chat template.
    """
    read_template(llm.folder)
    told: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    turns: list[Message] = []
    if not as_json:
        print("An empty line ends the chat.", file=sys.stderr)
    while line := _ask():
        turns.append({"role": "user", "content": line})
        answer = _answer(llm, session, told, turns, params, aloud=not as_json)
        turns.append({"role": "assistant", "content": answer})
        if as_json:
            print(json.dumps({"question": line, "answer": answer}), flush=True)


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


class _Answer:
    """The answer so far, drawn below the block map or printed as it grows."""

    def __init__(self, printed: bool) -> None:
        self.text = ""
        self._printed = printed

    def grow(self, text: str) -> None:
        if self._printed:
            print(text[len(self.text) :], end="", flush=True)
        self.text = text

    def __rich__(self) -> Text:
        return Text(self.text)


def _answer(
    llm: "LLM",
    session: Session,
    told: list[Message],
    turns: list[Message],
    params: "SamplingParams",
    aloud: bool,
) -> str:
    """The answer, shown as it is generated if `aloud`.

    If the chat outgrows the model's context, its oldest turns are dropped.
    """
    answer = _Answer(printed=aloud and not session.is_live)
    num_tokens, cached, start = 0, "", time.perf_counter() - session.seconds_watched
    try:
        with session.watch(answer if session.is_live else None):
            longest = llm.engine.config.max_model_len
            prompt = chat_prompt(llm.folder, llm.get_tokenizer(), told + turns, longest)
            for _, output in llm.stream(prompt, params):
                answer.grow(output.outputs[0].text.lstrip())
                num_tokens = len(output.outputs[0].token_ids)
                if output.num_cached_tokens:
                    asked = len(output.prompt_token_ids)
                    cached = f"; {output.num_cached_tokens} of {asked} prompt tokens were cached"
    except PromptTooLong:
        if len(turns) == 1:
            raise
        del turns[:2]
        return _answer(llm, session, told, turns, params, aloud)
    seconds = time.perf_counter() - session.seconds_watched - start
    if aloud:
        print("" if session.is_live else "\n", end="")
        speed = f"{num_tokens} tokens, {num_tokens / seconds:.0f} tokens/s"
        print(f"({speed}{cached})", file=sys.stderr)
    return answer.text
