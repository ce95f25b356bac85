"""All stop strings of a request as one automaton (Aho and Corasick 1975).

A state is the longest suffix of the text that is a prefix of some stop string. Each character leads
from one state to the next, so its cost does not depend on the number of stop strings:

    stop strings "he", "she"            after "s", "h"    the state is "sh"
    states       "", h, he, s, sh, she  then "e"          "she", which is complete
                                        or else "a"       "sh" falls back to "h", and that to ""
"""

from collections.abc import Iterable


class StopStrings:
    """The automaton. It is immutable, so any number of sequences can share it.

    State 0 is the empty text. Building takes time and memory in proportion to the total length of
    the strings.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._next: dict[tuple[int, str], int] = {}
        self._depth = [0]  # number of characters of each state
        self._complete: list[str | None] = [None]  # the longest stop string at the state's end
        reached_by = [(0, "")]  # previous state and character of each state
        for string in strings:
            state = 0
            for step in string:
                edge = (state, step)
                if edge not in self._next:
                    self._next[edge] = len(reached_by)
                    reached_by.append(edge)
                    self._depth.append(self._depth[state] + 1)
                    self._complete.append(None)
                state = self._next[edge]
            self._complete[state] = string
        # The state to continue from if a character has no edge: the longest shorter suffix. Shorter
        # states are computed first, because longer ones depend on them.
        self._fallback = [0] * len(reached_by)
        for state in sorted(range(1, len(reached_by)), key=self._depth.__getitem__):
            parent, step = reached_by[state]
            if parent:
                self._fallback[state] = self._advance(self._fallback[parent], step)
            if self._complete[state] is None:
                self._complete[state] = self._complete[self._fallback[state]]

    def __bool__(self) -> bool:
        """Whether there are any stop strings."""
        return bool(self._next)

    def read(self, state: int, text: str) -> tuple[int, int]:
        """Continue from `state` until a stop string is complete, or all of `text` is read.

        Returns the new state, and the number of characters read.
        """
        for num_read, character in enumerate(text, start=1):
            state = self._advance(state, character)
            if self._complete[state] is not None:
                return state, num_read
        return state, len(text)

    def complete(self, state: int) -> str | None:
        """The stop string that ends where this state ends, the longest if there are several."""
        return self._complete[state]

    def num_undecided(self, state: int) -> int:
        """The number of last characters that are a prefix of a stop string."""
        return self._depth[state]

    def _advance(self, state: int, character: str) -> int:
        while state and (state, character) not in self._next:
            state = self._fallback[state]
        return self._next.get((state, character), 0)
