"""The two forms of a reply: that of /v1/completions, and that of /v1/chat/completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minipaged.engine.outputs import CompletionOutput, NewTokens, RequestOutput
from minipaged.sampling.logprobs import Logprob, Logprobs
from minipaged.serving.protocol import ChatBody, CompletionBody
from minipaged.serving.replies import Reply, finite
from minipaged.serving.streams import Stream


@dataclass
class CompletionReply(Reply[CompletionBody]):
    """The reply to /v1/completions."""

    prefix = "cmpl"
    object = chunk_object = "text_completion"

    _offsets: dict[int, int] = field(default_factory=dict[int, int])  # of streams: characters

    @property
    def _only_echoes(self) -> bool:
        """Whether max_tokens is 0: the one token that the engine generates is not shown."""
        return self.body.max_tokens == 0

    def num_generated(self, completion: CompletionOutput) -> int:
        return 0 if self._only_echoes else len(completion.token_ids)

    def choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        text, ids = completion.text, completion.token_ids
        logprobs: Sequence[Logprobs | None] | None = completion.logprobs
        if self._only_echoes:
            text, ids, logprobs = "", [], None if logprobs is None else []
        if self.body.echo:
            text = self._prompt(output.prompt, output.prompt_token_ids) + text
            ids = [*output.prompt_token_ids, *ids]
            logprobs = None if logprobs is None else [*(output.prompt_logprobs or ()), *logprobs]
        return {"text": text, "logprobs": self._logprobs(ids, logprobs)}

    def opening(self, stream: Stream, prompt: int) -> dict[str, Any] | None:
        read = stream.requests[prompt].prompt
        return {"text": self._prompt(read.text, read.token_ids)} if self.body.echo else None

    def delta(self, index: int, new: NewTokens) -> dict[str, Any]:
        if self._only_echoes:
            return {"text": "", "logprobs": None}
        start = self._offsets.get(index, 0)
        found = self._logprobs(new.token_ids, new.logprobs, start)
        if found is not None:
            self._offsets[index] = start + sum(map(len, found["tokens"]))
        return {"text": new.text, "logprobs": found}

    def _prompt(self, text: str | None, token_ids: list[int]) -> str:
        """The prompt as text, even if it was given as token ids."""
        if text is not None or self.tokenizer is None:
            return text or ""
        return self.tokenizer.decode(token_ids)

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[Logprobs | None] | None, offset: int = 0
    ) -> dict[str, Any] | None:
        """OpenAI's four lists. The first token of a prompt has no log-probability."""
        if logprobs is None:
            return None
        lists = "tokens", "token_logprobs", "top_logprobs", "text_offset"
        shown: dict[str, list[Any]] = {name: [] for name in lists}
        for token_id, found in zip(ids, logprobs, strict=True):
            text, chosen, top = self.token_text(token_id), None, None
            if found is not None:
                chosen = finite(found[token_id].logprob)
                top = {self.token_text(i): finite(each.logprob) for i, each in found.items()}
            for name, value in zip(lists, (text, chosen, top, offset), strict=True):
                shown[name].append(value)
            offset += len(text)
        return shown


class ChatReply(Reply[ChatBody]):
    """The reply to /v1/chat/completions: a message, and log-probabilities with exact bytes."""

    prefix = "chatcmpl"
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text}
        return {"message": message, "logprobs": self._logprobs(completion)}

    def opening(self, stream: Stream, prompt: int) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, index: int, new: NewTokens) -> dict[str, Any]:
        return {"delta": {"content": new.text}, "logprobs": self._logprobs(new)}

    def _logprobs(self, tokens: CompletionOutput | NewTokens) -> dict[str, Any] | None:
        if tokens.logprobs is None:
            return None
        content: list[dict[str, Any]] = []
        for token_id, found in zip(tokens.token_ids, tokens.logprobs, strict=True):
            ranked = sorted(found.items(), key=lambda item: item[1].rank or 0)
            top = [self._token(i, each) for i, each in ranked[: self.body.top_logprobs or 0]]
            content.append({**self._token(token_id, found[token_id]), "top_logprobs": top})
        return {"content": content}

    def _token(self, token_id: int, found: Logprob) -> dict[str, Any]:
        """A token with its exact bytes, from which a client can assemble characters."""
        text, exact = self.token_text(token_id), list(self.token_bytes(token_id))
        return {"token": text, "logprob": finite(found.logprob), "bytes": exact}
