"""The load that measures a router: 8 system prompts, 32 requests each, on simulated servers.

A simulated server is the library's scheduler with the library's block manager, without a model: it
admits, preempts and caches as a real one does. In the simulation a word is a token, and all servers
step at the same time. The result is deterministic.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import cycle
from random import Random
from typing import Protocol

from minipaged.config import EngineConfig
from minipaged.evaluation.stories import tell
from minipaged.evaluation.testing.engine_without_model import EngineWithoutModel
from minipaged.memory import BlockManager
from minipaged.scheduler.fcfs import FCFSScheduler
from minipaged.sequence import Sequence as Tokens
from minipaged.sequence import SequenceGroup

NUM_SYSTEM_PROMPTS, NUM_REQUESTS = 8, 32
NUM_OPEN = 8  # concurrent requests
NUM_TOKENS = 8  # tokens that each generates
NUM_FACTS = 40  # of a system prompt: 320 words, or 444 tokens of the embedded model
CAPACITY = 560  # pieces of 16 characters in a pool of 112 blocks of 16 words of 5 characters

SERVER = EngineConfig(
    num_blocks=112,  # four system prompts, and the other blocks of four requests
    num_swap_blocks=0,
    block_size=16,
    max_model_len=1024,
    max_num_seqs=4,
    max_num_batched_tokens=256,
    enable_prefix_caching=True,
)


class Router(Protocol):
    """The interface that chooses a server for each request."""

    def choose(self, prompt: str, among: Collection[int] | None = None) -> int:
        """Choose the server for a request, which is open there from now on.

        Args:
            prompt: the text of the request.
            among: the servers that can be chosen; None: all.
        """
        ...

    def finish(self, server: int) -> None:
        """Record that one of a server's requests has ended."""
        ...

    def forget(self, server: int) -> None:
        """Record that a server was restarted or lost, so its cache is empty."""
        ...


class RoundRobin:
    """Round robin: the baseline for every router."""

    def __init__(self, num_servers: int) -> None:
        self._num_servers = num_servers
        self._turns = cycle(range(num_servers))

    def choose(self, prompt: str, among: Collection[int] | None = None) -> int:
        """Choose the next server."""
        servers = range(self._num_servers) if among is None else among
        return next(server for server in self._turns if server in servers)

    def finish(self, server: int) -> None:
        """Does nothing."""

    def forget(self, server: int) -> None:
        """Does nothing: round robin has no memory."""


# ---- the requests --------------------------------------------------------------------------------


def requests(seed: int = 0) -> list[tuple[str, str]]:
    """(system prompt, question) of each request, in the order of their arrival."""
    stories = [tell(NUM_FACTS, seed=seed + number) for number in range(NUM_SYSTEM_PROMPTS)]
    rng = Random(seed)
    asked = [
        (story.text, question.text)
        for story in stories
        for question in rng.sample(story.questions, NUM_REQUESTS)
    ]
    rng.shuffle(asked)
    return asked


def prompt_of(system: str, question: str) -> str:
    """The prompt that a router receives."""
    return f"{system}\nQ: {question}\nA:"


# ---- simulated servers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """The result of a load with one router."""

    num_queried_tokens: int  # looked up in the prefix caches
    num_cached_tokens: int  # and found there
    num_requests: list[int]  # by server
    largest_gap: int  # difference in open requests between the most and the least loaded server
    num_steps: int

    @property
    def hit_rate(self) -> float:
        return self.num_cached_tokens / self.num_queried_tokens


class SimulatedServer(EngineWithoutModel):
    """A server without a model, which counts prefix cache hits."""

    def __init__(self, config: EngineConfig) -> None:
        memory = BlockManager(
            num_blocks=config.num_blocks,
            num_swap_blocks=config.num_swap_blocks,
            block_size=config.block_size,
            watermark_blocks=config.watermark_blocks,
            enable_prefix_caching=True,
        )
        super().__init__(FCFSScheduler(config, memory))
        self.num_queried_tokens = self.num_cached_tokens = 0

    def receive(self, token_ids: Sequence[int]) -> None:
        """Add a request."""
        seq = Tokens(self.new_id(), token_ids)
        group = SequenceGroup(f"{len(self.groups)}", [seq])
        self.scheduler.add(group)
        self.groups.append(group)
        self.lengths.append(NUM_TOKENS)
        self.samples.append([seq])

    def advance(self) -> int:
        """Run a step; return how many requests ended in it."""
        before = len(self.finished)
        if self.scheduler.has_unfinished():
            decision = self.step()
            self.num_queried_tokens += decision.num_queried_tokens
            self.num_cached_tokens += decision.num_cached_tokens
        return len(self.finished) - before


def simulate(
    router: Router, prompts: Sequence[str], num_servers: int = 2, config: EngineConfig = SERVER
) -> Report:
    """Serve prompts with a constant number of open requests."""
    servers = [SimulatedServer(config) for _ in range(num_servers)]
    words: dict[str, int] = {}  # token ids
    waiting, loads, sent = deque(prompts), [0] * num_servers, [0] * num_servers
    largest_gap = num_steps = 0
    while waiting or any(loads):
        while waiting and sum(loads) < NUM_OPEN:
            prompt = waiting.popleft()
            server = router.choose(prompt)
            assert server in range(num_servers), (
                f"choose() returned {server!r}, but the servers are 0 to {num_servers - 1}"
            )
            ids = [words.setdefault(word, len(words)) for word in prompt.split()]
            servers[server].receive(ids)
            sent[server] += 1
            loads[server] += 1
        largest_gap = max(largest_gap, max(loads) - min(loads))
        for number, server in enumerate(servers):
            for _ in range(server.advance()):
                loads[number] -= 1
                router.finish(number)
        num_steps += 1
    queried = sum(server.num_queried_tokens for server in servers)
    cached = sum(server.num_cached_tokens for server in servers)
    return Report(queried, cached, sent, largest_gap, num_steps)
