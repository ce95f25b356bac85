"""The types of prompts with vLLM's names, for annotations; `prompts.py` converts them."""

from typing import TypedDict

from minipaged.tokenizer.prompts import Prompt

PromptType = Prompt


class TextPrompt(TypedDict, total=False):
    """A prompt as text, as in vLLM: {"prompt": text}."""

    prompt: str
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids, as in vLLM: {"prompt_token_ids": ids}."""

    prompt_token_ids: list[int]
    prompt: str
    cache_salt: str
