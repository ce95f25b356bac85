"""The reply to /v1/chat/completions: a message, and log-probabilities with exact bytes."""

from collections.abc import Sequence
from typing import Any

from minipaged.engine.outputs import CompletionOutput, NewTokens, RequestOutput
from minipaged.sampling.logprobs import Logprob, Logprobs
from minipaged.serving.protocol import ChatBody
from minipaged.serving.replies import Reply, finite
from minipaged.serving.streams import Stream


class ChatReply(Reply[ChatBody]):
    """The reply to /v1/chat/completions."""

    prefix = "chatcmpl"
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text}
        found = self._logprobs(completion.token_ids, completion.logprobs)
        return {"message": message, "logprobs": found}

    def opening(self, stream: Stream, prompt: int) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, index: int, new: NewTokens) -> dict[str, Any]:
        found = self._logprobs(new.token_ids, new.logprobs)
        return {"delta": {"content": new.text}, "logprobs": found}

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[Logprobs] | None
    ) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        content: list[dict[str, Any]] = []
        for token_id, found in zip(ids, logprobs, strict=True):
            ranked = sorted(found.items(), key=lambda item: item[1].rank or 0)
            top = [self._token(i, each) for i, each in ranked[: self.body.top_logprobs or 0]]
            content.append({**self._token(token_id, found[token_id]), "top_logprobs": top})
        return {"content": content}

    def _token(self, token_id: int, found: Logprob) -> dict[str, Any]:
        """A token with its exact bytes, from which a client can put characters together."""
        text, exact = self.token_text(token_id), list(self.token_bytes(token_id))
        return {"token": text, "logprob": finite(found.logprob), "bytes": exact}
