"""A conversation as a prompt: rendered by the checkpoint's template, then encoded."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipaged.errors import MissingTokenizer
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.chat_template import Message, read_chat
from minipaged.tokenizer.prompts import Prompt, refuse_too_long
from minipaged.utils.options import refuse_unknown


def chat_prompt(
    folder: Path,
    tokenizer: Tokenizer | None,
    messages: Message | Sequence[Message],
    max_model_len: int,
    **options: Any,
) -> Prompt:
    """Convert a conversation to a prompt; `options` and errors are those of `read_chat`.

    The template writes all special tokens, so none is added when the text is encoded. A special
    token that a message spells out is encoded as plain text (control_tokens.py).

    Raises:
        MissingTokenizer: there is no tokenizer.
        PromptTooLong: the text cannot fit.
        InvalidOption: there is no option of that name.
        InvalidRequest: the template refuses the messages.
    """
    known = inspect.signature(read_chat).parameters.values()
    refuse_unknown(options, [each.name for each in known if each.kind is each.KEYWORD_ONLY])
    chat = read_chat(folder, messages, **options)
    text = chat.render()
    if tokenizer is None:
        raise MissingTokenizer("a chat is text, but the model's folder contains no tokenizer.")
    refuse_too_long(text, tokenizer, max_model_len)
    return {"prompt": text, "prompt_token_ids": tokenizer.encode_chat(chat, text)}
