"""`minipaged chat`: a conversation in the terminal, a line a turn."""

import json
import sys

from minipaged.chat import Message, render_chat
from minipaged.errors import PromptTooLong
from minipaged.llm import LLM
from minipaged.sampling import SamplingParams
from minipaged.terminal import Session


def converse(
    llm: LLM, session: Session, system: str | None, params: SamplingParams, as_json: bool
) -> None:
    """Read questions and print answers until an empty line or the end of the input."""
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


def _answer(
    llm: LLM,
    session: Session,
    told: list[Message],
    turns: list[Message],
    params: SamplingParams,
    aloud: bool,
) -> str:
    """The answer, printed as it comes if `aloud`.

    A chat that outgrows the model's context forgets its oldest turns.
    """
    shown = ""
    try:
        with session.watch(None):
            for _, output in llm.stream(render_chat(llm.folder, told + turns), params):
                text = output.outputs[0].text.lstrip()
                if aloud:
                    print(text[len(shown) :], end="", flush=True)
                shown = text
            if aloud:
                print()
    except PromptTooLong:
        if len(turns) == 1:
            raise
        del turns[:2]
        return _answer(llm, session, told, turns, params, aloud)
    return shown
