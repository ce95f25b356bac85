"""Parameters of vLLM's SamplingParams and BeamSearchParams that this library does not support.

Each is refused in one sentence that names it, unless its value asks for nothing.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

from minipaged.errors import InvalidOption
from minipaged.utils.options import refuse_unknown

T = TypeVar("T", bound=type)

_GUIDED = "output that must follow a grammar or schema is not built here"
_RAW = "give logprobs=-1 and pick the tokens from the result"
_BEAMS = "give BeamSearchParams instead"

NOT_BUILT = {
    "structured_outputs": _GUIDED,
    "guided_decoding": _GUIDED,
    "thinking_token_budget": "a limit on a model's reasoning is not built here",
    "repetition_detection": "the search for repeated patterns is not built here; see the penalties",
    "watermarking": "marks in the choice of tokens are not built here",
    "logprob_token_ids": _RAW,
    "prompt_logprob_token_ids": _RAW,
    "prompt_logprob_start": _RAW,
    "flat_logprobs": "logprobs come as a list of dicts here",
    "stream_interval": "every token is streamed here",
    "extra_args": "a custom part can hold its own options here (see Parts)",
    "routed_experts_prompt_start": "models with experts are not built here",
    "trace_decode_token_ids": "give the tokens as a prompt with prompt_logprobs to score them",
    "skip_reading_prefix_cache": "give the prompt a cache_salt of its own",
    "use_beam_search": _BEAMS,
    "length_penalty": _BEAMS,
    "early_stopping": _BEAMS,
    "concurrency_limit": "all prompts are searched together",
}
"""By name, and what to do instead."""

WITHOUT_EFFECT = {"skip_clone": "a request always copies its parameters"}
"""Accepted with any value, by name, and why nothing changes."""


def refuses_what_is_not_built(cls: T) -> T:
    """Let a dataclass refuse every unknown argument with a sentence, not with a TypeError."""
    make: Callable[..., None] = cls.__init__

    @wraps(make)
    def refuse_and_make(self: Any, *args: Any, **named: Any) -> None:
        known = [each.name for each in fields(cls) if each.init]
        for name in [name for name in named if name not in known]:
            value = named.pop(name)
            if name in NOT_BUILT and value is not None and value is not False:
                raise InvalidOption(f"{name} cannot be honoured: {NOT_BUILT[name]}.", name)
            if name not in NOT_BUILT and name not in WITHOUT_EFFECT:
                refuse_unknown([name], known)
        make(self, *args, **named)

    cls.__init__ = refuse_and_make
    return cls
