"""Replies of megabytes, built and sent while the event loop serves other requests."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest

from minipaged.engine.outputs import CompletionOutput, NewTokens, Progress, RequestOutput
from minipaged.sampling.logprobs import Logprob
from minipaged.serving import replies, service
from minipaged.serving.protocol import ChatBody, CompletionBody
from minipaged.serving.reply_forms import ChatReply, CompletionReply

NUM_TOKENS, NUM_SAMPLES = 2000, 4
LOGPROBS = [{1: Logprob(-0.5, 1, "a")} for _ in range(NUM_TOKENS)]
FORMS = {
    CompletionReply: CompletionBody(prompt="Once", n=NUM_SAMPLES, logprobs=1),
    ChatReply: ChatBody(messages=[{}], n=NUM_SAMPLES, logprobs=True),
}


class Tokenizer:
    """Notes in which threads it is called."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def token_bytes(self, token_id: int) -> bytes:
        self.threads.add(threading.get_ident())
        return b"a"


class Stream:
    """All samples of one request, which have finished before they are read."""

    requests = [SimpleNamespace(prompt=SimpleNamespace(token_ids=[1], text="a"))]

    def __init__(self) -> None:
        completions = [
            CompletionOutput(i, "a" * NUM_TOKENS, [1] * NUM_TOKENS, 0.0, LOGPROBS, "length")
            for i in range(NUM_SAMPLES)
        ]
        self.output = RequestOutput("0", "a", [1], completions, True, None)

    async def results(self) -> list[RequestOutput]:
        return [self.output]

    async def __aiter__(self):
        new = [NewTokens.of(each) for each in self.output.outputs]
        yield [(0, Progress("0", new, True, lambda: self.output))]


@pytest.mark.parametrize("form", FORMS)
def test_log_probabilities_are_encoded_outside_the_loop(form):
    tokenizer = Tokenizer()
    reply = form("id", "model", FORMS[form], tokenizer)
    whole = json.loads(asyncio.run(reply.whole(Stream())))
    assert [choice["index"] for choice in whole["choices"]] == list(range(NUM_SAMPLES))
    assert whole["usage"]["completion_tokens"] == NUM_SAMPLES * NUM_TOKENS
    assert tokenizer.threads
    assert threading.get_ident() not in tokenizer.threads


@pytest.mark.parametrize("form", FORMS)
def test_other_requests_run_between_two_large_events(form):
    turns: list[str] = []

    async def other() -> None:
        while True:
            turns.append("other")
            await asyncio.sleep(0)

    async def read() -> None:
        task = asyncio.create_task(other())
        async for events in form("id", "model", FORMS[form], Tokenizer()).events(Stream()):
            if len(events) > replies.LARGE_EVENT:
                turns.append("large")
        task.cancel()

    asyncio.run(read())
    assert turns.count("large") == NUM_SAMPLES
    assert "large large" not in " ".join(turns)


def test_a_large_reply_is_sent_in_pieces():
    body = bytes(range(256)) * (5 * service.PIECE_BYTES // 512)

    async def read() -> list[bytes]:
        return [piece async for piece in service.pieces(body)]

    found = asyncio.run(read())
    assert b"".join(found) == body
    assert [len(piece) for piece in found] == [service.PIECE_BYTES] * 2 + [service.PIECE_BYTES // 2]
