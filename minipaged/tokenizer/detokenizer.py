"""Tokens of one sequence to text that can be shown while the sequence still grows.

A token is some bytes, not some characters, and text once shown cannot be taken back. So everything
that later tokens could still change is held back:

    shown    | held             | undecoded
    "so far" | "#"              | b"\\xf0\\x9f"      "##" is a stop string; half an emoji

    shown      final; each piece of it was returned by `add` or `finish` exactly once
    held       characters that could be the beginning of a stop string
    undecoded  bytes that could be the beginning of a character
"""

import codecs

from minipaged.tokenizer.base import Tokenizer


class Detokenizer:
    """One sequence's text, token by token; special tokens are left out of it.

    The sequence ends where the first stop string is complete, and its text just before that stop
    string, however the characters were spread over tokens. If several become complete at the same
    character, the longest of them counts. Stop strings are not looked for in the text of the first
    `min_tokens` tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), *, min_tokens: int = 0
    ) -> None:
        self.text = ""
        """What was shown so far; once finished, all of it."""
        self.stopped: str | None = None
        """The stop string that ended the sequence."""
        self._vocabulary = tokenizer.vocabulary
        self._special_ids = tokenizer.special_ids
        self._stops = sorted(stop, key=len, reverse=True)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        # It keeps the undecoded bytes, and replaces wrong ones as decoding all at once would.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """Take one more token and return what it lets be shown. After a stop, that is nothing."""
        self._num_tokens += 1
        if self.stopped is not None or token_id in self._special_ids:
            return ""
        return self._take(self._decoder.decode(self._vocabulary.get(token_id, b"")))

    def finish(self) -> str:
        """No token will follow: return what was held back. A character cut short is U+FFFD."""
        if self.stopped is not None:
            return ""
        piece = self._take(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _take(self, new: str) -> str:
        """Decide over newly decoded characters: which to show, which to hold back."""
        if not self._stops or self._num_tokens <= self._min_tokens:  # nothing to look for
            self.text += new
            return new
        window = self._held + new
        safe = self._find_stop(window, start=len(self._held))
        if safe is None:
            safe = len(window) - self._num_undecided(window)
        piece = window[:safe]
        self._held = "" if self.stopped else window[safe:]
        self.text += piece
        return piece

    def _find_stop(self, window: str, start: int) -> int | None:
        """Where the first stop string begins that is completed by a character from `start` on."""
        for end in range(start + 1, len(window) + 1):
            for stop in self._stops:
                if window.endswith(stop, 0, end):
                    self.stopped = stop
                    return end - len(stop)
        return None

    def _num_undecided(self, window: str) -> int:
        """How many of the last characters are the beginning of a stop string."""
        longest = len(self._stops[0]) - 1 if self._stops else 0
        for size in range(min(longest, len(window)), 0, -1):
            if any(stop.startswith(window[-size:]) for stop in self._stops):
                return size
        return 0
