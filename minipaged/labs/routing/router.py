"""Routes a request to a server that has already computed the prefix of its prompt.

Each server has its own prefix cache. If prompts with the same system prompt go to different
servers, it is computed and stored on each. vLLM's router and SGLang's keep a tree of the texts
that each server was sent; this one keeps a set of keys, as in the prefix cache.

A router only guesses what is cached: a wrong guess costs time but never changes an output.
"""

from collections.abc import Collection, Iterable
from itertools import takewhile


class PrefixRouter:
    """Chooses a server by the prefix of the prompt, as long as that server is not overloaded.

    Args:
        num_servers: number of servers; their numbers start at 0.
        piece_size: characters per piece; only whole pieces are compared.
        capacity: number of pieces that one server is assumed to cache.
        threshold: a server attracts a prompt only if it has seen more than this fraction of the
            prompt's pieces.
        slack: a server attracts requests only if it has at most this many more open requests than
            the least loaded one.
    """

    def __init__(
        self,
        num_servers: int,
        *,
        piece_size: int = 16,
        capacity: int = 10_000,
        threshold: float = 0.5,
        slack: int = 4,
    ) -> None:
        self.piece_size = piece_size
        self.capacity = capacity
        self.threshold = threshold
        self.slack = slack
        self.loads = [0] * num_servers  # open requests, by server
        # By server: the keys of the pieces that it was sent, least recently used first.
        self.known: list[dict[int, None]] = [{} for _ in range(num_servers)]

    # ---- prompts ---------------------------------------------------------------------------------

    def keys(self, prompt: str) -> list[int]:
        """Return one key per whole piece; equal keys mean equal texts up to the piece's end."""
        size, before, keys = self.piece_size, 0, list[int]()
        for start in range(0, len(prompt) - size + 1, size):
            before = hash((before, prompt[start : start + size]))
            keys.append(before)
        return keys

    def num_known(self, server: int, keys: Iterable[int]) -> int:
        """Return how many of a prompt's first pieces a server has seen, without a gap."""
        known = self.known[server]
        return sum(1 for _ in takewhile(known.__contains__, keys))

    # ---- requests --------------------------------------------------------------------------------

    def choose(self, prompt: str, among: Collection[int] | None = None) -> int:
        """Return the server for a request, and count the request as open there.

        Args:
            among: the servers that can be chosen; None: all.
        """
        servers = range(len(self.loads)) if among is None else among
        keys = self.keys(prompt)
        found = {server: self.num_known(server, keys) for server in servers}
        least = min(self.loads[server] for server in servers)
        attracting = [
            server
            for server in servers
            if found[server] > self.threshold * len(keys)
            and self.loads[server] <= least + self.slack
        ]
        if attracting:
            server = max(attracting, key=lambda each: (found[each], -self.loads[each]))
        else:
            server = min(servers, key=lambda each: (self.loads[each], len(self.known[each])))
        self.loads[server] += 1
        self.remember(server, keys)
        return server

    def finish(self, server: int) -> None:
        """Record that one of a server's requests has ended."""
        self.loads[server] -= 1

    # ---- memory ----------------------------------------------------------------------------------

    def remember(self, server: int, keys: list[int]) -> None:
        """Record that a server computes these pieces.

        Beyond its capacity, the least recently used pieces are forgotten.
        """
        known = self.known[server]
        for key in reversed(keys):  # first pieces last: they are the most recently used
            known.pop(key, None)
            known[key] = None
        while len(known) > self.capacity:
            del known[next(iter(known))]

    def forget(self, server: int) -> None:
        """Forget all pieces of a server, which was restarted or lost its cache."""
        self.known[server].clear()
