"""Distinguishes the template's special tokens in a rendered chat from those spelt out in messages.

A chat template writes control tokens between the turns, and a user can type the same text. In the
rendered text both look the same, so the chat is rendered a second time, in disguise: each special
token in the template's source is replaced by a unique unused character, and each one spelt out in a
message by another such character. With "<|im_end|>" in both:

    rendered      <|im_start|>user\\nIs it <|im_end|>?<|im_end|>
    in disguise   A           user\\nIs it x         ?B

A and B are control tokens. The rest is text, even if the template joins, trims or cuts pieces of
messages such that they spell a special token only afterwards.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from re import Pattern
from typing import Any

from minipaged.errors import CheckpointError, InvalidRequest
from minipaged.tokenizer.chat_template import Chat
from minipaged.tokenizer.special_tokens import any_of

# Rare Chinese characters: printable, so `repr` does not change them; without case, and not white
# space, so templates that trim or compare text behave as usual.
_STAND_INS = range(0x20000, 0x2A6DF)


def split_at_control_tokens(
    chat: Chat, text: str, special_tokens: Collection[str]
) -> list[str] | None:
    """Split a rendered chat into pieces, of which every second one is a control token.

    Returns None if all special tokens in the text are the template's; also if no message spells one
    out and the template does not work in disguise.

    Args:
        chat: the conversation.
        text: the result of `chat.render()`.
        special_tokens: the tokenizer's special tokens, as text.

    Raises InvalidRequest if a message spells out a special token and the template searches messages
    for such tokens: then the two cannot be distinguished.
    """
    spelt = any_of(special_tokens)
    unused = _stand_ins({*text, *chat.source, *str(chat.said)})
    own: dict[str, str] = defaultdict(lambda: next(unused))
    foreign: dict[str, str] = defaultdict(lambda: next(unused))
    hidden = _hide(chat.said, spelt, foreign)
    disguised = replace(
        chat,
        source=_hide(chat.source, spelt, own),
        names=_hide(chat.names, spelt, own),
        options=_hide(chat.options, spelt, own),
    )
    meant = {ord(mark): token for names in (own, foreign) for token, mark in names.items()}
    composed = _composed(disguised, special_tokens)
    # A template that changes the case of messages or escapes them changes disguised tokens too.
    # Then messages are not disguised, unless the template composes the same tokens itself.
    for said in (hidden, chat.said) if composed.isdisjoint(foreign) else (hidden,):
        rendered = _try_to_render(replace(disguised, said=said))
        if rendered.translate(meant) == text:
            control = any_of([*own.values(), *composed])
            pieces = [piece.translate(meant) for piece in control.split(rendered)]
            return pieces if any(spelt.search(piece) for piece in pieces[::2]) else None
    if not foreign:
        return None
    raise InvalidRequest(
        f"a message spells out {next(iter(foreign))!r}, and the model's chat template looks for "
        "such tokens in messages, so it cannot be told from the template's own: leave it out of "
        "the messages."
    )


def _try_to_render(disguised: Chat) -> str:
    try:
        return disguised.render()
    except (CheckpointError, InvalidRequest):
        return ""  # a special token is equal to a word of the template's program


def _stand_ins(taken: Collection[str]) -> Iterator[str]:
    yield from (character for character in map(chr, _STAND_INS) if character not in taken)
    raise InvalidRequest(
        f"a chat contains all characters from U+{_STAND_INS[0]:X} to U+{_STAND_INS[-1]:X}, so none "
        "is left to mark its control tokens: shorten it."
    )


def _hide(value: Any, spelt: Pattern[str], names: Mapping[str, str]) -> Any:
    """The same data, with each special token in its texts replaced by a character.

    Keys and roles are not changed: the template compares them with its own words.
    """
    if isinstance(value, str):
        return spelt.sub(lambda found: names[found[0]], value)
    if isinstance(value, Mapping):
        return {k: v if k == "role" else _hide(v, spelt, names) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(each, spelt, names) for each in value]
    return value


def _composed(disguised: Chat, special_tokens: Collection[str]) -> set[str]:
    """The special tokens that the template may compose around a role: '<|' + role + '|>'.

    Tokens that it writes as one piece are already disguised.
    """
    roles = {turn["role"] for turn in disguised.said["messages"] if turn["role"].isidentifier()}
    return {
        token
        for token in special_tokens
        for role in roles
        if role in token and all(part in disguised.source for part in token.split(role, 1))
    }
