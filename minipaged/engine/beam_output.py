"""Results of beam search in vLLM's form, in addition to our own."""

from dataclasses import dataclass, field

from minipaged.engine.outputs import FinishReason, RequestOutput
from minipaged.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class BeamSearchSequence:
    """One result of beam search in vLLM's form: the tokens of prompt and output together."""

    tokens: list[int]
    text: str | None  # None: the model has no tokenizer
    cum_logprob: float
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass(frozen=True)
class BeamSearchOutput(RequestOutput):
    """The result of `LLM.beam_search`: a `RequestOutput` with vLLM's `sequences` in addition."""

    sequences: list[BeamSearchSequence] = field(default_factory=list[BeamSearchSequence])

    @classmethod
    def of(cls, output: RequestOutput, tokenizer: Tokenizer | None) -> "BeamSearchOutput":
        """Add vLLM's form to a `RequestOutput`."""
        sequences: list[BeamSearchSequence] = []
        for each in output.outputs:
            tokens = output.prompt_token_ids + each.token_ids
            text = None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
            end = (each.cumulative_logprob, each.finish_reason, each.stop_reason)
            sequences.append(BeamSearchSequence(tokens, text, *end))
        return cls(**vars(output), sequences=sequences)
