"""Parameters of vLLM's SamplingParams and BeamSearchParams that this library does not support."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

from minipaged.utils.not_built import by_name, refuse_not_built

T = TypeVar("T", bound=type)

NOT_BUILT = by_name({
    "output that must follow a grammar or schema is not built": {
        "structured_outputs": None, "guided_decoding": None,
    },
    "a limit on a model's reasoning is not built": {"thinking_token_budget": None},
    "only the penalties act against repetition": {"repetition_detection": None},
    "watermarking is not built": {"watermarking": None},
    "log-probabilities are given for all tokens (logprobs=-1) or for the likeliest": {
        "logprob_token_ids": None, "prompt_logprob_token_ids": None,
    },
    "prompt_logprobs covers the whole prompt": {"prompt_logprob_start": 0},
    "logprobs are a list of dicts": {"flat_logprobs": False},
    "every step reports every new token": {"stream_interval": 1},
    "a custom part holds its own options (see Parts)": {"extra_args": None},
    "models with experts are not built": {"routed_experts_prompt_start": None},
    "tokens are scored as a prompt, with prompt_logprobs": {"trace_decode_token_ids": None},
    "only a cache_salt of its own keeps a prompt from the prefix cache": {
        "skip_reading_prefix_cache": False,
    },
    "beam search takes BeamSearchParams": {
        "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False,
    },
    "all prompts are searched together": {"concurrency_limit": None},
})  # fmt: skip

WITHOUT_EFFECT = {"skip_clone": "a request always copies its parameters"}
"""Names that are accepted with any value, and why they have no effect."""


def refuses_what_is_not_built(cls: T) -> T:
    """Make a dataclass refuse every unknown argument with a sentence instead of a TypeError."""
    make: Callable[..., None] = cls.__init__

    @wraps(make)
    def refuse_and_make(self: Any, *args: Any, **named: Any) -> None:
        known = [each.name for each in fields(cls) if each.init]
        for name in [name for name in named if name not in known]:
            value = named.pop(name)
            if name not in WITHOUT_EFFECT:
                refuse_not_built(name, value, NOT_BUILT, known)
        make(self, *args, **named)

    cls.__init__ = refuse_and_make
    return cls
