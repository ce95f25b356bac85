"""Replies: the engine's outputs as OpenAI's JSON, whole or in chunks of a stream."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from minipaged.engine.outputs import CompletionOutput, NewTokens, RequestOutput
from minipaged.errors import RequestFailed
from minipaged.serving.errors import as_event
from minipaged.serving.protocol import GenerationBody, StreamOptions
from minipaged.serving.streams import ClientLeft, Stream
from minipaged.tokenizer.base import Tokenizer

LEAST_LOGPROB = -9999.0
DONE = b"data: [DONE]\n\n"
LARGE_EVENT = 2**15  # bytes, which took some milliseconds


B = TypeVar("B", bound=GenerationBody)


@dataclass
class Reply(Generic[B]):
    """The reply to one HTTP request, which may have several prompts.

    Choices are numbered prompt by prompt: index = prompt * n + sample.
    """

    request_id: str
    model: str
    body: B
    tokenizer: Tokenizer | None
    created: int = field(default_factory=lambda: int(time.time()))

    # ---- different for completions and chats -----------------------------------------------------

    prefix = object = chunk_object = ""

    def choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """Text and logprobs of one complete sample."""
        raise NotImplementedError

    def opening(self, stream: Stream, prompt: int) -> dict[str, Any] | None:
        """The first chunk of a choice, before any token; None if there is none."""
        raise NotImplementedError

    def delta(self, index: int, new: NewTokens) -> dict[str, Any]:
        """The new text and logprobs of one sample."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; empty without a tokenizer."""
        return b"" if self.tokenizer is None else self.tokenizer.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """The text of a single token; half a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    # ---- whole -----------------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """The number of samples per prompt."""
        return self.body.n or 1

    async def whole(self, stream: Stream) -> bytes:
        """Wait for all outputs. Raises the error of the first request that failed."""
        outputs = await stream.results()
        if self.body.num_logprobs() is None and self.body.num_prompt_logprobs() is None:
            return self._encode(outputs)
        return await asyncio.to_thread(self._encode, outputs)  # can be 100 MB

    def _encode(self, outputs: list[RequestOutput]) -> bytes:
        """The reply as JSON, one choice at a time: other threads run only between two of them."""
        choices: list[bytes] = []
        for prompt, output in enumerate(outputs):
            for completion in output.outputs:
                index = prompt * self.num_samples + completion.index
                choice = self._choice(index, self.choice(output, completion), completion)
                if self.body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(output)
                if self.body.return_token_ids:
                    choice["prompt_token_ids"] = output.prompt_token_ids
                choices.append(json.dumps(choice).encode())
        head, usage = json.dumps(self._head(self.object)), json.dumps(self._usage(outputs))
        parts = f'{head[:-1]}, "choices": ['.encode(), f'], "usage": {usage}}}'.encode()
        return b", ".join(choices).join(parts)

    def _choice(
        self, index: int, content: dict[str, Any], tokens: CompletionOutput | NewTokens
    ) -> dict[str, Any]:
        """A choice, whole or of a chunk. Raises RequestFailed if its logits were broken."""
        if tokens.finish_reason == "error":
            error = tokens.error if isinstance(tokens, CompletionOutput) else None
            raise RequestFailed(error or "the model's logits are broken: see the server's log.")
        choice = {"index": index, **content, "finish_reason": tokens.finish_reason}
        choice["stop_reason"] = tokens.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = tokens.token_ids
        return choice

    def _head(self, name: str) -> dict[str, Any]:
        reply_id = f"{self.prefix}-{self.request_id}"
        return {"id": reply_id, "object": name, "created": self.created, "model": self.model}

    def _usage(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        return usage(
            sum(len(output.prompt_token_ids) for output in outputs),
            sum(self.num_generated(each) for output in outputs for each in output.outputs),
            sum(output.num_cached_tokens for output in outputs),
        )

    def num_generated(self, completion: CompletionOutput) -> int:
        """The number of tokens of a sample that the reply shows."""
        return len(completion.token_ids)

    # ---- in chunks -------------------------------------------------------------------------------

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """Server-sent events, one per choice and delivery; an error also becomes an event.

        Events that are ready together are yielded together, because writing to a socket is slow.
        """
        options = self.body.stream_options or StreamOptions()
        each_usage = options.include_usage and options.continuous_usage_stats
        shows_all = each_usage or self.body.return_token_ids
        head = json.dumps(self._head(self.chunk_object))[:-1]
        prompt_tokens = sum(len(each.prompt.token_ids) for each in stream.requests)
        num_generated, finals = 0, list[RequestOutput]()

        def chunk(choice: dict[str, Any] | None) -> bytes:
            numbers = "null"
            if choice is None:
                numbers = json.dumps(self._usage(finals))
            elif each_usage:
                numbers = json.dumps(usage(prompt_tokens, num_generated))
            tail = f', "usage": {numbers}' if options.include_usage else ""
            shown = "" if choice is None else json.dumps(choice)
            return f'data: {head}, "choices": [{shown}]{tail}}}\n\n'.encode()

        ready: list[bytes] = []
        try:
            for index in range(len(stream.requests) * self.num_samples):
                opening = self.opening(stream, index // self.num_samples)
                if opening is not None:
                    choice = {"index": index, **opening, "logprobs": None, "finish_reason": None}
                    ready.append(chunk(choice))
            async for news in stream:
                for prompt, progress in news:
                    for new in progress.new:
                        num_generated += len(new.token_ids)
                        # A step may have no text yet: that of its tokens may come later.
                        if new.text or new.logprobs or new.finish_reason or shows_all:
                            index = prompt * self.num_samples + new.completion
                            ready.append(chunk(self._choice(index, self.delta(index, new), new)))
                            if len(ready[-1]) > LARGE_EVENT:
                                yield b"".join(ready)
                                ready.clear()
                                await asyncio.sleep(0)  # let other requests run
                    if progress.finished:
                        finals.append(progress.build_output())
                if ready and len(finals) < len(stream.requests):
                    yield b"".join(ready)
                    ready.clear()
            if options.include_usage:
                ready.append(chunk(None))
        except ClientLeft:
            return  # no one reads what would follow
        except Exception as error:  # the status line was sent long ago
            ready.append(as_event(error))
        yield b"".join([*ready, DONE])


def usage(prompt_tokens: int, completion_tokens: int, cached: int | None = None) -> dict[str, Any]:
    """OpenAI's usage object; `cached` is the number of prompt tokens in the prefix cache."""
    total = prompt_tokens + completion_tokens
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {**counts, "total_tokens": total, **details}


def prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None]:
    """vLLM's extra field: for each token of the prompt but the first, a dict by token id."""
    shown: list[dict[str, Any] | None] = [None]
    for found in (output.prompt_logprobs or ())[1:]:
        items = (found or {}).items()
        shown.append(
            {str(i): {**asdict(each), "logprob": finite(each.logprob)} for i, each in items}
        )
    return shown


def finite(logprob: float) -> float:
    """Limit a log-probability, because JSON cannot represent minus infinity."""
    return max(logprob, LEAST_LOGPROB)
