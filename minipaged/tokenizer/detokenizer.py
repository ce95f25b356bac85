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
from collections.abc import Iterable

from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.stop_strings import StopStrings


class Detokenizer:
    """One sequence's text, token by token.

    The sequence ends where the first stop string is complete, and its text just before that stop
    string, however the characters were spread over tokens. If several become complete at the same
    character, the longest of them counts. Stop strings are not looked for in the text of the first
    `min_tokens` tokens.

    Args:
        after: the tokens before this text, such as its prompt. Where they show nothing, the text
            begins here, and some tokenizers then leave out its first space.
        skip_special_tokens: leave special tokens out of the text.
        keeps_stop: end the text after the stop string instead of before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: StopStrings | tuple[str, ...] = (),
        *,
        min_tokens: int = 0,
        after: Iterable[int] = (),
        skip_special_tokens: bool = True,
        keeps_stop: bool = False,
    ) -> None:
        self.text = ""
        """What was shown so far; once finished, all of it."""
        self.stopped: str | None = None
        """The stop string that ended the sequence."""
        self.tokenizer = tokenizer
        self._vocabulary = tokenizer.vocabulary
        self._skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._begins_text = all(token_id in tokenizer.special_ids for token_id in after)
        self._stops = stop if isinstance(stop, StopStrings) else StopStrings(stop)
        self._may_stop = bool(self._stops)
        self._state = 0  # of the stop strings
        self._keeps_stop = keeps_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        # It keeps the undecoded bytes, and replaces wrong ones as decoding all at once would.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """Take one more token and return what it lets be shown. After a stop, that is nothing."""
        self._num_tokens += 1
        if self.stopped is not None or token_id in self._skipped_ids:
            return ""
        token = self._vocabulary.get(token_id, b"")
        if self._begins_text and token:
            self._begins_text = False
            token = self.tokenizer.first_token_bytes(token_id)
        return self._take(self._decoder.decode(token))

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
        if not self._may_stop or self._num_tokens <= self._min_tokens:  # nothing to look for
            self.text += new
            return new
        self._state, num_read = self._stops.read(self._state, new)
        self.stopped = self._stops.complete(self._state)
        if self._keeps_stop:
            self.text += new[:num_read]
            return new[:num_read]
        window = self._held + new[:num_read]
        safe = len(window) - self._stops.num_undecided(self._state)
        if self.stopped is not None:
            safe = len(window) - len(self.stopped)
        piece, self._held = window[:safe], "" if self.stopped else window[safe:]
        self.text += piece
        return piece
