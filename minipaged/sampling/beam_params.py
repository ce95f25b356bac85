"""BeamSearchParams: the parameters of a beam search, with vLLM's names and meanings."""

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
    """The parameters of a beam search. Raises `InvalidOption` for an invalid value.

    The score of a finished sequence is its log-probability divided by length ** length_penalty:
    values above 0 favour long sequences, values below 0 short ones. early_stopping sets when the
    search ends: True, once `beam_width` sequences have ended; False, once no beam would score
    better if it ended now; "never", once no beam could score better at any length.
    """

    beam_width: int
    max_tokens: int | None = 16  # None: as many as the model's context holds
    length_penalty: Number = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    temperature: Number = 0.0  # beam search is deterministic, so only 0 is accepted

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
        """Return a copy, and check it again: the caller may have changed this one."""
        return replace(self)

    def num_candidates(self, num_ends: int) -> int:
        """Return how many candidates a step compares, if `num_ends` tokens can end a sequence.

        They suffice for `beam_width` beams to continue even if all of the best candidates end.
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
