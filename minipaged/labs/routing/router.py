"""Which of several servers gets a request: one that has already computed its beginning.

Each server caches prefixes on its own. A prompt that goes to another server than the last one with
the same system prompt is computed and stored a second time. vLLM's router and SGLang's keep a tree
of the texts that each server was sent; here it is a set of keys, as in the prefix cache.

A router only guesses what is cached: a wrong guess costs time and never changes an output.
"""

from collections.abc import Collection, Iterable
from itertools import takewhile


class PrefixRouter:
    """Chooses a server by the beginning of the prompt, as long as that server is not overloaded.

    Args:
        num_servers: they are numbered from 0.
        piece_size: characters per piece; only whole pieces are compared.
        capacity: pieces that one server is believed to cache.
        threshold: the part of a prompt's pieces that a server must know to attract it.
        slack: how many more requests than the least loaded server a server may have open before
            it attracts none.
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
        # By server: the keys of the pieces that it was sent, the least recently used one first.
        self.known: list[dict[int, None]] = [{} for _ in range(num_servers)]

    # ---- prompts -------------------------------------------------------------------------------

    def keys(self, prompt: str) -> list[int]:
        """A key for each whole piece: equal for two prompts that are equal up to its end."""
        size, before, keys = self.piece_size, 0, list[int]()
        for start in range(0, len(prompt) - size + 1, size):
            before = hash((before, prompt[start : start + size]))
            keys.append(before)
        return keys

    def num_known(self, server: int, keys: Iterable[int]) -> int:
        """How many of a prompt's first pieces a server has seen, without a gap."""
        known = self.known[server]
        return sum(1 for _ in takewhile(known.__contains__, keys))

    # ---- requests ------------------------------------------------------------------------------

    def choose(self, prompt: str, among: Collection[int] | None = None) -> int:
        """The server for a request, which is open there from now on.

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
        """One of a server's requests has ended."""
        self.loads[server] -= 1

    # ---- memory --------------------------------------------------------------------------------

    def remember(self, server: int, keys: list[int]) -> None:
        """A server will have computed these pieces; beyond the capacity, forget the oldest ones."""
        known = self.known[server]
        for key in reversed(keys):  # a beginning is used whenever its continuation is: it is newer
            known.pop(key, None)
            known[key] = None
        while len(known) > self.capacity:
            del known[next(iter(known))]

    def forget(self, server: int) -> None:
        """A server was restarted or lost, and with it all that it had cached."""
        self.known[server].clear()
