"""The reply to /v1/completions: text, and OpenAI's older form of log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minipaged.engine.outputs import CompletionOutput, NewTokens, RequestOutput
from minipaged.sampling.logprobs import Logprobs
from minipaged.serving.protocol import CompletionBody
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
        """max_tokens=0: the token that the engine generates at least is not shown."""
        return self.body.max_tokens == 0

    def num_generated(self, completion: CompletionOutput) -> int:
        return 0 if self._only_echoes else len(completion.token_ids)

    def choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        text, ids = completion.text, completion.token_ids
        logprobs: Sequence[Logprobs | None] | None = completion.logprobs
        if self.body.echo:
            shown = [] if self._only_echoes else ids
            text = self._prompt_text(output) + ("" if self._only_echoes else text)
            if logprobs is not None:
                logprobs = [*(output.prompt_logprobs or ()), *logprobs[: len(shown)]]
            ids = [*output.prompt_token_ids, *shown]
        found = None if logprobs is None else self._logprobs(ids, logprobs, 0)
        return {"text": text, "logprobs": found}

    def opening(self, stream: Stream, prompt: int) -> dict[str, Any] | None:
        if not self.body.echo:
            return None
        read = stream.requests[prompt].prompt
        return {"text": self._text_of(read.text, read.token_ids)}

    def delta(self, index: int, new: NewTokens) -> dict[str, Any]:
        if self._only_echoes:
            return {"text": "", "logprobs": None}
        found = None
        if new.logprobs is not None:
            start = self._offsets.get(index, 0)
            found = self._logprobs(new.token_ids, new.logprobs, start)
            self._offsets[index] = start + sum(map(len, found["tokens"]))
        return {"text": new.text, "logprobs": found}

    def _prompt_text(self, output: RequestOutput) -> str:
        return self._text_of(output.prompt, output.prompt_token_ids)

    def _text_of(self, text: str | None, token_ids: list[int]) -> str:
        if text is not None or self.tokenizer is None:
            return text or ""
        return self.tokenizer.decode(token_ids)

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[Logprobs | None], offset: int
    ) -> dict[str, Any]:
        """OpenAI's four lists; the first token of a prompt has no log-probability."""
        tokens: list[str] = []
        chosen: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, found in zip(ids, logprobs, strict=True):
            tokens.append(self.token_text(token_id))
            offsets.append(offset)
            offset += len(tokens[-1])
            chosen.append(None if found is None else finite(found[token_id].logprob))
            top.append(
                None
                if found is None
                else {self.token_text(i): finite(each.logprob) for i, each in found.items()}
            )
        return {
            "tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets,
        }  # fmt: skip
