"""Converts the tokens of one sequence to text that can be shown while the sequence grows.

A token is a sequence of bytes, not of characters, and shown text cannot be taken back. Everything
that later tokens could still change is therefore held back:

    shown    | held             | undecoded
    "so far" | "#"              | b"\\xf0\\x9f"      "##" is a stop string; half an emoji

    shown      final; each piece of it was returned by `add` or `finish` exactly once
    held       characters that could be the start of a stop string
    undecoded  bytes that could be the start of a character
"""

import codecs
from collections.abc import Iterable

from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.stop_strings import StopStrings


class Detokenizer:
    """One sequence's text, token by token.

    The sequence ends where the first stop string is complete; its text ends just before that stop
    string, even if a token spans both. If several become complete at the same character, the
    longest one counts. Stop strings are not searched in the text of the first `min_tokens` tokens.

    Args:
        after: the tokens before this text, such as its prompt. If they have no text, this is the
            start of the text, where some tokenizers omit the first space.
        skip_special_tokens: omit special tokens from the text.
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
        """The text shown so far; once finished, all of it."""
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
        # It keeps undecoded bytes, and replaces invalid ones as in decoding all at once.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_whole = True  # no byte of an incomplete character is undecoded

    def add(self, token_id: int) -> str:
        """Add a token and return the text that can now be shown; nothing after a stop."""
        self._num_tokens += 1
        if self.stopped is not None or token_id in self._skipped_ids:
            return ""
        token = self._vocabulary.get(token_id, b"")
        if self._begins_text and token:
            self._begins_text = False
            token = self.tokenizer.first_token_bytes(token_id)
        if self._is_whole and token.isascii():  # most tokens need no decoder, which is slower
            return self._take(token.decode("ascii"))
        new = self._decoder.decode(token)
        self._is_whole = not self._decoder.getstate()[0]
        return self._take(new)

    def finish(self) -> str:
        """End the text and return what was held back. An incomplete character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        piece = self._take(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _take(self, new: str) -> str:
        """Decide which newly decoded characters to show and which to hold back."""
        if not self._may_stop or self._num_tokens <= self._min_tokens:  # no stop strings
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
