"""Converts messages to one prompt: renders the checkpoint's own chat template in a sandbox.

Every chat model was trained with its own marks between the turns, and published with a program that
inserts them: a Jinja template. Templates can use the same functions here as in Hugging Face's
`transformers`.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minipaged.errors import CheckpointError, InvalidOption, InvalidRequest
from minipaged.tokenizer.special_tokens import read_special_names
from minipaged.utils.files import read_json_object
from minipaged.utils.options import require_type, shown

TEMPLATE_FILE = "chat_template.jinja"


class Message(TypedDict):
    """One turn: a role ("system", "user" or "assistant") and its content."""

    role: str
    content: str


def list_chats(messages: Any) -> list[Any]:
    """Convert one conversation or many to a list; a single message is a conversation too."""
    many = isinstance(messages, list | tuple) and messages
    if many and all(isinstance(chat, list | tuple) for chat in messages):
        return list(messages)
    return [messages]


@dataclass(frozen=True)
class Chat:
    """A checked conversation, and the template that renders it."""

    folder: Path | None
    """The folder that the template was read from, for error messages."""
    source: str
    """The template."""
    names: Mapping[str, str]
    """The special tokens that the template may use, by role: bos_token and so on."""
    said: Mapping[str, Any]
    """Untrusted input: messages, tools and documents."""
    options: Mapping[str, Any]
    """Other variables of the template."""
    continues: bool
    """Whether the text ends inside the last message."""

    def render(self) -> str:
        """Render the prompt.

        Raises CheckpointError for a broken template, InvalidRequest if it refuses.
        """
        turns = self.said["messages"]
        end_mark = f"\ue000{secrets.token_hex(8)} "  # a mark to find the end of the last message
        said = turns[-1]["content"]
        if self.continues:
            turns = [*turns[:-1], {**turns[-1], "content": said + end_mark}]
        try:
            template = _compile(self.source)
        except Exception as error:  # a foreign program, which can raise anything
            where = "that was given" if self.folder is None else f"of {self.folder}"
            raise CheckpointError(
                f"the chat template {where} is broken: {_said(error)}."
            ) from error
        try:
            text = template.render({**self.names, **self.said, "messages": turns, **self.options})
        except Exception as error:
            raise InvalidRequest(
                f"the model's chat template refuses the messages: {_said(error)}."
            ) from error
        return _cut_at(end_mark, text, said) if self.continues else text


def read_chat(
    folder: Path | None,
    messages: Message | Sequence[Message],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Chat:
    """Check a conversation, and read the template of the model in `folder`.

    A template comes with the checkpoint, so it is not trusted: in the sandbox it can only read the
    messages and build text.

    Args:
        folder: contains chat_template.jinja, or a tokenizer_config.json with a "chat_template".
        messages: the turns so far; a single message is a conversation of one turn.
        chat_template: replaces the checkpoint's own.
        add_generation_prompt: whether to open the assistant's turn at the end.
        continue_final_message: leave the last message open, so that the model continues it.
        tools: JSON schemas of functions that the model may call.
        chat_template_kwargs: more variables for the template, as {"enable_thinking": False}.

    Raises:
        CheckpointError: the folder contains no template, or one that cannot be read.
        InvalidRequest: the input is not a chat.
        InvalidOption: an option has the wrong type, or chat_template_kwargs contains another one.
    """
    require_type("chat_template", chat_template, str, optional=True)
    require_type("add_generation_prompt", add_generation_prompt, bool)
    require_type("continue_final_message", continue_final_message, bool)
    require_type("tools", tools, list, optional=True)
    require_type("chat_template_kwargs", chat_template_kwargs, Mapping, optional=True)
    turns = [_read_message(turn) for turn in _not_empty(messages)]
    if continue_final_message:
        _refuse_to_continue(turns[-1], add_generation_prompt)
    more = dict(chat_template_kwargs or {})
    if taken := sorted({"messages", "tools"} & more.keys()):
        raise InvalidOption(
            f"chat_template_kwargs sets {taken[0]}, which has its own argument: give it there.",
            "chat_template_kwargs",
        )
    documents = more.pop("documents", None)
    return Chat(
        folder,
        read_template(folder, bool(tools)) if chat_template is None else chat_template,
        {"bos_token": "", "eos_token": "", **(read_special_names(folder) if folder else {})},
        {"messages": turns, "tools": tools, "documents": documents},
        {"add_generation_prompt": add_generation_prompt, **more},
        continue_final_message,
    )


def render_chat(folder: Path, messages: Message | Sequence[Message], **options: Any) -> str:
    """The prompt that asks the model in `folder` for the next assistant turn.

    `options` are those of `read_chat`. Raises what `read_chat` and `Chat.render` raise.
    """
    return read_chat(folder, messages, **options).render()


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    return _environment().from_string(source, globals=_FUNCTIONS)


def _said(error: Exception) -> str:
    """An error's message, on one line and without its full stop."""
    return " ".join(str(error).split()).rstrip(".!") or type(error).__name__


def read_template(folder: Path | None, with_tools: bool = False) -> str:
    """Read the checkpoint's template. Raises CheckpointError if it has none."""
    if folder is None:
        raise CheckpointError(
            "the tokenizer was not read from a model's folder, so it has no chat template: give "
            "chat_template."
        )
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): download it again.") from error
    config = folder / "tokenizer_config.json"
    template = read_json_object(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
        template = (named.get("tool_use") if with_tools else None) or named.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{folder} contains no chat template ({TEMPLATE_FILE}, or one in "
            "tokenizer_config.json), so the model's chat format is unknown, or it "
            "was not trained to chat: use generate() with a prompt of your own."
        )
    return template


# --------------------------------------------------------------------------------- the messages


def _not_empty(messages: Any) -> list[Any]:
    return list(messages) if isinstance(messages, list | tuple) and messages else [messages]


def _read_message(turn: Any) -> dict[str, Any]:
    """The turn as plain data, with the parts of its content joined.

    With other objects, a template could call their methods. Raises InvalidRequest if it is invalid.
    """
    if isinstance(turn, dict) and isinstance(turn.get("role"), str):
        content = turn.get("content")
        if isinstance(content, list) and all(_is_text(part) for part in content):
            content = "\n".join(part["text"] for part in content)
        if content is None and turn.get("tool_calls"):
            content = ""  # templates add text to it
        if isinstance(content, str):
            with suppress(Exception):  # foreign keys and values, which can raise anything
                return json.loads(json.dumps({**turn, "content": content}, default=str))
    raise InvalidRequest(
        f"{shown(turn)} is not a chat message: give a list of "
        '{"role": "user", "content": "some text"}.'
    )


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _refuse_to_continue(last: dict[str, Any], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise InvalidRequest(
            "the final message cannot be continued after the opening of a new one: with "
            "continue_final_message give add_generation_prompt=False."
        )
    if not last["content"]:
        raise InvalidRequest(
            "the final message has no content, so it cannot be continued: leave out "
            "continue_final_message."
        )


def _cut_at(end_mark: str, text: str, said: str) -> str:
    """The prompt without the template's text after the last message."""
    # A template that strips messages has removed the mark's own space.
    stripped = end_mark not in text
    before, *after = text.split(end_mark.strip() if stripped else end_mark)
    before = before.rstrip() if stripped else before
    if len(after) != 1 or not before.rstrip().endswith(said.rstrip()):
        raise InvalidRequest(
            "the chat template leaves the final message out or rewrites it, so it cannot be "
            "continued: leave out continue_final_message."
        )
    return before


# --------------------------------------------------------------------- what templates can count on


class _GenerationTag(Extension):
    """`{% generation %}`: marks the assistant's text for training. Here it has no effect."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter escapes "<" for HTML, which is not what models were trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(reason: str) -> None:
    raise TemplateError(reason)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


# Functions that templates call: to refuse messages, and to get the date.
_FUNCTIONS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
