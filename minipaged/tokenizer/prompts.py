"""The accepted forms of a prompt, and their conversion to token ids."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from minipaged.errors import InvalidRequest, MissingTokenizer, PromptTooLong
from minipaged.tokenizer.base import Tokenizer
from minipaged.utils.options import shown

Prompt = str | Iterable[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's {"prompt": text} and {"prompt_token_ids": ids}.

The dicts may also have a "cache_salt": only prompts with equal salts share cached blocks.
"""

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_FORMS = (
    'give text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a list of '
    "such prompts"
)


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt for the engine: its token ids, and its text if it was given as text."""

    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None


def list_prompts(prompts: Any) -> list[Prompt]:
    """Convert one prompt or many to a list of prompts. Raises InvalidRequest for other input."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    many = _as_list(prompts)
    if many and all(_is_token_id(item) for item in many):
        return [many]  # one prompt, in token ids
    return many


def read_prompt(
    prompt: Any, tokenizer: Tokenizer | None, max_model_len: int | None
) -> TokenizedPrompt:
    """Convert a prompt of any form.

    Raises:
        InvalidRequest: it is not a prompt, or it is empty.
        PromptTooLong: it has, or its text must have, `max_model_len` tokens or more; never if
            that is None.
        MissingTokenizer: it is text, and the model has no tokenizer.
    """
    salt = None
    if isinstance(prompt, Mapping):
        for key in prompt:
            if key not in _KEYS and prompt[key] is not None:
                raise InvalidRequest(
                    f"a prompt has the key {shown(key)}: its keys are prompt, prompt_token_ids and "
                    "cache_salt; the models read text only."
                )
        salt = _read_salt(prompt.get("cache_salt"))
        if "prompt_token_ids" in prompt:
            ids = _read_token_ids(prompt["prompt_token_ids"], max_model_len)
            text = prompt.get("prompt")
            if text is not None and not isinstance(text, str):
                raise InvalidRequest(
                    f"a prompt's text is {shown(text)}: give a string, or leave it out."
                )
            return TokenizedPrompt(text, ids, salt)
        prompt = prompt.get("prompt")
    if not isinstance(prompt, str):
        return TokenizedPrompt(None, _read_token_ids(prompt, max_model_len), salt)
    if tokenizer is None:
        raise MissingTokenizer(
            "the prompt is text, but the model's folder contains no tokenizer, or it was left out "
            "(skip_tokenizer_init): give the prompt as a list of token ids."
        )
    if max_model_len is not None:
        refuse_too_long(prompt, tokenizer, max_model_len)
    return TokenizedPrompt(prompt, _not_empty(tokenizer.encode(prompt)), salt)


def refuse_too_long(text: str, tokenizer: Tokenizer, max_model_len: int) -> None:
    """Raise PromptTooLong for text that cannot fit, before encoding it."""
    fewest = tokenizer.fewest_tokens(text)
    if fewest >= max_model_len:
        raise PromptTooLong(
            f"the prompt has {len(text)} characters, so at least {fewest} tokens, but prompt and "
            f"output together may have only {max_model_len} (max_model_len). Shorten the prompt, "
            "or raise max_model_len if the model allows."
        )


def _read_salt(salt: Any) -> str | None:
    if salt is not None and not (isinstance(salt, str) and salt):
        raise InvalidRequest(
            f"cache_salt is {shown(salt)}: give a string of one character or more."
        )
    return salt


def _read_token_ids(prompt: Any, max_model_len: int | None) -> list[int]:
    token_ids = _as_list(prompt)
    if max_model_len is not None and len(token_ids) >= max_model_len:
        raise PromptTooLong.in_context(len(token_ids), max_model_len)  # before each is checked
    for token_id in token_ids:
        if not _is_token_id(token_id):
            raise InvalidRequest(
                f"a prompt contains {shown(token_id)}, which is not a token id: {_FORMS}; ids are "
                "whole numbers."
            )
    return _not_empty([int(token_id) for token_id in token_ids])


def _not_empty(token_ids: list[int]) -> list[int]:
    if not token_ids:
        raise InvalidRequest("the prompt is empty: give at least one token to go on from.")
    return token_ids


def _as_list(value: Any) -> list[Any]:
    if hasattr(value, "tolist"):  # an array or tensor
        value = value.tolist()
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise InvalidRequest(f"{shown(value)} is not a prompt: {_FORMS}.")
    return list(value)


def _is_token_id(item: Any) -> bool:
    return isinstance(item, Integral) and item is not True and item is not False
