"""From messages to one prompt: the checkpoint's own chat template, rendered in a sandbox."""

from pathlib import Path
from typing import Any, TypedDict

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minipaged.errors import CheckpointError, InvalidRequest

TEMPLATE_FILE = "chat_template.jinja"


class Message(TypedDict):
    """One turn: who speaks ("system", "user" or "assistant") and what is said."""

    role: str
    content: str


def render_chat(folder: Path, messages: list[Message]) -> str:
    """The prompt that asks the model in `folder` for the next assistant turn.

    A template comes with the checkpoint, so it is somebody else's program: the sandbox lets it
    read the messages and build text, and nothing more.

    Raises:
        CheckpointError: the folder holds no template, or one that cannot be read.
        InvalidRequest: the template refuses these messages.
    """
    _refuse_what_is_no_chat(messages)
    path = folder / TEMPLATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {TEMPLATE_FILE}, so it is not known how the model was taught to "
            "chat: use generate() with a prompt of your own."
        )
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        template = environment.from_string(path.read_text(encoding="utf-8"))
    except TemplateError as error:
        raise CheckpointError(f"{path} is no template that can be read: {error}.") from error
    try:
        return template.render(
            messages=messages, add_generation_prompt=True, raise_exception=_raise_exception
        )
    except TemplateError as error:
        raise InvalidRequest(f"the model's chat template refuses the messages: {error}.") from error


def _refuse_what_is_no_chat(messages: Any) -> None:
    turns = messages if isinstance(messages, list) else [messages]
    for turn in turns or [None]:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise InvalidRequest(
                f"{turn!r} is no message of a chat: give a list of "
                '{"role": "user", "content": "some text"}.'
            )


def _raise_exception(reason: str) -> None:
    """Templates call this by name to refuse messages, as in Hugging Face's `transformers`."""
    raise TemplateError(reason)
