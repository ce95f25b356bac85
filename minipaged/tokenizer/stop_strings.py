"""All stop strings of a request as one automaton (Aho and Corasick 1975).

A state is the longest end of the text that some stop string begins with. Each character leads from
one state to the next, so a character costs the same however many stop strings there are:

    stop strings "he", "she"            after "s", "h"    the state is "sh"
    states       "", h, he, s, sh, she  then "e"          "she", which is complete
                                        or else "a"       "sh" falls back to "h", and that to ""
"""

from collections.abc import Iterable


class StopStrings:
    """The automaton. It does not change once built, so any number of sequences can share it.

    State 0 is the empty text. Building takes time and memory in proportion to all characters of
    the strings.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._next: dict[tuple[int, str], int] = {}
        self._depth = [0]  # how many characters a state stands for
        self._complete: list[str | None] = [None]  # the longest stop string at the state's end
        reached_by = [(0, "")]  # from which state, with which character
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
        # Where to look on if a character leads nowhere: the state of the longest shorter end.
        # Shorter states come first, since longer ones are found by way of them.
        self._fallback = [0] * len(reached_by)
        for state in sorted(range(1, len(reached_by)), key=self._depth.__getitem__):
            parent, step = reached_by[state]
            if parent:
                self._fallback[state] = self._advance(self._fallback[parent], step)
            if self._complete[state] is None:
                self._complete[state] = self._complete[self._fallback[state]]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._next)

    def read(self, state: int, text: str) -> tuple[int, int]:
        """Read on in `state` until a stop string is complete, or all of `text` is read.

        Returns the new state, and how many characters of `text` were read.
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
        """How many of the last characters are the beginning of a stop string."""
        return self._depth[state]

    def _advance(self, state: int, character: str) -> int:
        while state and (state, character) not in self._next:
            state = self._fallback[state]
        return self._next.get((state, character), 0)
