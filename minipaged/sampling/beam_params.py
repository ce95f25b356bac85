"""What a request asks of beam search, in vLLM's names and meanings."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from minipaged.errors import InvalidOption
from minipaged.sampling.checks import RULES, check_flag, is_number
from minipaged.sampling.not_built import refuses_what_is_not_built
from minipaged.utils.options import shown

Number = float | int


@refuses_what_is_not_built
@dataclass
class BeamSearchParams:
    """What a request asks of beam search. Raises `InvalidOption` for a value that cannot work.

    A finished sequence scores its log-probability, divided by length ** length_penalty: above 0,
    long sequences win more easily, below 0 short ones. early_stopping says when the search ends:
    True, once `beam_width` sequences have ended; False, once none of the beams would score better
    if it ended now; "never", once none could at any length.
    """

    beam_width: int
    max_tokens: int | None = 16  # None: as many as the model's context holds
    length_penalty: Number = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    temperature: Number = 0.0  # nothing is drawn: only 0 is accepted, for scripts written for vLLM

    def __post_init__(self) -> None:
        if not is_number(self.temperature, float) or self.temperature != 0:
            raise InvalidOption(
                f"temperature is {shown(self.temperature)}, but beam search draws nothing: leave "
                "it 0.",
                "temperature",
            )
        for name in "beam_width", "max_tokens", "length_penalty":
            setattr(self, name, RULES[name].check(name, getattr(self, name)))
        early: Any = self.early_stopping
        if not isinstance(early, bool) and not (isinstance(early, str) and early == "never"):
            raise InvalidOption(
                f'early_stopping is {shown(early)}: choose True, False or "never".',
                "early_stopping",
            )
        check_flag("ignore_eos", self.ignore_eos)

    def clone(self) -> "BeamSearchParams":
        """A copy, checked once more: the caller may have changed this one."""
        return replace(self)

    def num_candidates(self, num_ends: int) -> int:
        """How many candidates a step compares, if so many tokens can end a sequence.

        Enough for `beam_width` to go on even if all of the best end there.
        """
        return max(2, 1 + (0 if self.ignore_eos else num_ends)) * self.beam_width

    def check_vocab(self, vocab_size: int, num_ends: int) -> None:
        """Raise `InvalidOption` if the vocabulary has fewer tokens than the first step compares."""
        if self.num_candidates(num_ends) > vocab_size:
            most = vocab_size * self.beam_width // self.num_candidates(num_ends)
            raise InvalidOption(
                f"beam_width is {self.beam_width}, so the first step compares "
                f"{self.num_candidates(num_ends)} tokens, but the vocabulary has {vocab_size}: "
                f"choose a beam_width up to {most}.",
                "beam_width",
            )
