"""The reply to /v1/chat/completions: a message, and log-probabilities with exact bytes."""

from collections.abc import Sequence
from typing import Any

from minipaged.engine.outputs import CompletionOutput, NewTokens, RequestOutput
from minipaged.sampling.logprobs import Logprobs
from minipaged.serving.protocol import ChatBody
from minipaged.serving.replies import Reply, finite
from minipaged.serving.streams import Stream


class ChatReply(Reply[ChatBody]):
    """The reply to /v1/chat/completions."""

    prefix = "chatcmpl"
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text}
        found = completion.logprobs
        return {
            "message": message,
            "logprobs": None if found is None else self._logprobs(completion.token_ids, found),
        }

    def opening(self, stream: Stream, prompt: int) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, index: int, new: NewTokens) -> dict[str, Any]:
        found = new.logprobs
        return {
            "delta": {"content": new.text},
            "logprobs": None if found is None else self._logprobs(new.token_ids, found),
        }

    def _logprobs(self, ids: Sequence[int], logprobs: Sequence[Logprobs]) -> dict[str, Any]:
        most = self.body.top_logprobs or 0
        content: list[dict[str, Any]] = []
        for token_id, found in zip(ids, logprobs, strict=True):
            ranked = sorted(found.items(), key=lambda item: item[1].rank or 0)[:most]
            likeliest = [self._token(i, each.logprob) for i, each in ranked]
            content.append(
                {**self._token(token_id, found[token_id].logprob), "top_logprobs": likeliest}
            )
        return {"content": content}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        """A token with its exact bytes, from which a client can put characters together."""
        return {
            "token": self.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": list(self.token_bytes(token_id)),
        }
