"""Lab 10: classic mistakes, each with the task that it must cost points; and unusual right ones."""

BEGINNING = """
from minipaged.labs.routing.router import PrefixRouter as Library
"""

WRONG = {
    "a_key_without_what_is_before": (
        1,
        """
class PrefixRouter(Library):
    def keys(self, prompt):
        size = self.piece_size
        return [prompt[i : i + size] for i in range(0, len(prompt) - size + 1, size)]
""",
    ),
    "a_key_by_place_without_what_is_before": (
        1,
        """
class PrefixRouter(Library):
    def keys(self, prompt):
        size = self.piece_size
        return [(i, prompt[i : i + size]) for i in range(0, len(prompt) - size + 1, size)]
""",
    ),
    "a_key_for_the_rest": (
        1,
        """
class PrefixRouter(Library):
    def keys(self, prompt):
        return super().keys(prompt + " " * (-len(prompt) % self.piece_size))
""",
    ),
    "one_key_for_the_whole_prompt": (
        1,
        """
class PrefixRouter(Library):
    def keys(self, prompt):
        return [hash(prompt)] * (len(prompt) // self.piece_size)
""",
    ),
    "hashes_the_whole_beginning_each_time": (
        1,
        """
class PrefixRouter(Library):
    def keys(self, prompt):
        size = self.piece_size
        return [str(list(prompt[:end])) for end in range(size, len(prompt) + 1, size)]
""",
    ),
    "counts_after_a_gap": (
        2,
        """
class PrefixRouter(Library):
    def num_known(self, server, keys):
        return sum(key in self.known[server] for key in keys)
""",
    ),
    "one_table_for_all_servers": (
        2,
        """
class PrefixRouter(Library):
    def __init__(self, num_servers, **options):
        super().__init__(num_servers, **options)
        self.known = [{}] * num_servers
""",
    ),
    "remembers_the_last_prompt_only": (
        2,
        """
class PrefixRouter(Library):
    def remember(self, server, keys):
        self.known[server] = dict.fromkeys(reversed(keys))
""",
    ),
    "remembers_while_it_asks": (
        2,
        """
class PrefixRouter(Library):
    def num_known(self, server, keys):
        found = super().num_known(server, keys)
        self.remember(server, list(keys))
        return found
""",
    ),
    "round_robin": (
        3,
        """
class PrefixRouter(Library):
    def choose(self, prompt, among=None):
        self.turn = getattr(self, "turn", -1) + 1
        servers = list(range(len(self.loads)) if among is None else among)
        server = servers[self.turn % len(servers)]
        self.loads[server] += 1
        self.remember(server, self.keys(prompt))
        return server
""",
    ),
    "the_least_loaded": (
        3,
        """
class PrefixRouter(Library):
    def choose(self, prompt, among=None):
        servers = range(len(self.loads)) if among is None else among
        server = min(servers, key=self.loads.__getitem__)
        self.loads[server] += 1
        return server
""",
    ),
    "never_balances": (
        3,
        """
class PrefixRouter(Library):
    def choose(self, prompt, among=None):
        self.slack = 10**9
        return super().choose(prompt, among)
""",
    ),
    "any_common_piece_attracts": (
        3,
        """
class PrefixRouter(Library):
    def choose(self, prompt, among=None):
        self.threshold = 0.0
        return super().choose(prompt, among)
""",
    ),
    "does_not_remember": (
        3,
        """
class PrefixRouter(Library):
    def choose(self, prompt, among=None):
        before = [dict(known) for known in self.known]
        server = super().choose(prompt, among)
        self.known = before
        return server
""",
    ),
    "never_counts_out": (
        3,
        """
class PrefixRouter(Library):
    def finish(self, server):
        pass
""",
    ),
    "chooses_what_cannot_be_chosen": (
        3,
        """
class PrefixRouter(Library):
    def choose(self, prompt, among=None):
        return super().choose(prompt)
""",
    ),
    "compares_with_those_that_cannot_be_chosen": (
        3,
        """
class PrefixRouter(Library):
    def choose(self, prompt, among=None):
        servers = range(len(self.loads)) if among is None else among
        keys = self.keys(prompt)
        found = {server: self.num_known(server, keys) for server in servers}
        least = min(self.loads)
        close = [s for s in servers if self.loads[s] <= least + self.slack]
        attracting = [s for s in close if found[s] > self.threshold * len(keys)]
        if attracting:
            server = max(attracting, key=lambda s: (found[s], -self.loads[s]))
        else:
            server = min(servers, key=lambda s: (self.loads[s], len(self.known[s])))
        self.loads[server] += 1
        self.remember(server, keys)
        return server
""",
    ),
    "forgets_nothing": (
        4,
        """
class PrefixRouter(Library):
    def remember(self, server, keys):
        self.known[server].update(dict.fromkeys(keys))
""",
    ),
    "forgets_the_oldest_however_often_used": (
        4,
        """
class PrefixRouter(Library):
    def remember(self, server, keys):
        known = self.known[server]
        for key in reversed(keys):
            known.setdefault(key)
        while len(known) > self.capacity:
            del known[next(iter(known))]
""",
    ),
    "forgets_beginnings_first": (
        4,
        """
class PrefixRouter(Library):
    def remember(self, server, keys):
        super().remember(server, keys[::-1])
""",
    ),
    "forgets_everything_when_full": (
        4,
        """
class PrefixRouter(Library):
    def remember(self, server, keys):
        known = self.known[server]
        if len(known) + len(keys) > self.capacity:
            known.clear()
        known.update(dict.fromkeys(keys))
""",
    ),
    "a_lost_server_takes_all_knowledge_along": (
        4,
        """
class PrefixRouter(Library):
    def forget(self, server):
        for known in self.known:
            known.clear()
""",
    ),
    "a_lost_server_keeps_its_knowledge": (
        4,
        """
class PrefixRouter(Library):
    def forget(self, server):
        pass
""",
    ),
}

RIGHT = {
    "a_tree_of_pieces": """
class PrefixRouter(Library):
    \"\"\"Keys are the nodes of a tree, numbered as they grow.\"\"\"

    def keys(self, prompt):
        size, node, keys = self.piece_size, 0, []
        tree = self.__dict__.setdefault("tree", {})
        for start in range(0, len(prompt) - size + 1, size):
            node = tree.setdefault((node, prompt[start : start + size]), len(tree) + 1)
            keys.append(node)
        return keys

    def num_known(self, server, keys):
        number = 0
        while number < len(keys) and keys[number] in self.known[server]:
            number += 1
        return number
""",
    "sorts_the_servers": """
class PrefixRouter(Library):
    def choose(self, prompt, among=None):
        keys = self.keys(prompt)
        servers = sorted(range(len(self.loads)) if among is None else among)
        least = min(map(self.loads.__getitem__, servers))

        def rank(server):
            found = self.num_known(server, keys)
            attracts = found > self.threshold * len(keys) and (
                self.loads[server] - least <= self.slack
            )
            if attracts:
                return 0, -found, self.loads[server]
            return 1, self.loads[server], len(self.known[server])

        server = sorted(servers, key=rank)[0]
        self.loads[server] += 1
        self.remember(server, keys)
        return server
""",
}
