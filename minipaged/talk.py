"""`minipaged chat`: a conversation in the terminal, a line a turn."""

import sys

from minipaged.chat import Message, render_chat
from minipaged.errors import PromptTooLong
from minipaged.llm import LLM
from minipaged.sampling import SamplingParams
from minipaged.terminal import Session


def converse(llm: LLM, session: Session, system: str | None, params: SamplingParams) -> None:
    """Read questions and print answers until an empty line or the end of the input."""
    told: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    turns: list[Message] = []
    print("An empty line ends the chat.", file=sys.stderr)
    while line := _ask():
        turns.append({"role": "user", "content": line})
        turns.append({"role": "assistant", "content": _answer(llm, session, told, turns, params)})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _answer(
    llm: LLM,
    session: Session,
    told: list[Message],
    turns: list[Message],
    params: SamplingParams,
) -> str:
    """Print the answer as it comes. A chat that outgrows the context forgets its oldest turns."""
    shown = ""
    try:
        with session.watch(None):
            for _, output in llm.stream(render_chat(llm.folder, told + turns), params):
                text = output.outputs[0].text.lstrip()
                print(text[len(shown) :], end="", flush=True)
                shown = text
            print()
    except PromptTooLong:
        if len(turns) == 1:
            raise
        del turns[:2]
        return _answer(llm, session, told, turns, params)
    return shown
