"""Wrong tokens make a time meaningless, so `minipaged bench engine` checks all of them.

All engines decode greedily, and in float32 they must agree. The two likeliest tokens may be so
close that rounding decides: from there on, every token must be very close to the likeliest in its
own context. In half precision rounding decides often.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from minipaged.errors import MinipagedError
from minipaged.evaluation.bench.engine_peer import Request
from minipaged.evaluation.bench.engine_sides import OURS

# Tolerated distance of a token's logit from the largest: the rounding error of this model's logits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


class WrongTokens(MinipagedError):
    """A timed run generated wrong tokens, so its time is meaningless."""


@dataclass(frozen=True)
class Referee:
    """Compares an engine's tokens with a model that computes them in another way."""

    name: str
    shortfalls: Callable[[list[int], list[int]], list[float]]
    seen: dict[tuple[int, ...], list[float]] = field(default_factory=dict)

    def check(
        self,
        run: str,
        by: str,
        requests: list[Request],
        tokens: list[list[int]],
        trusted: list[list[int]] | None,
        tolerance: float,
    ) -> int:
        """Count requests in which rounding decided. Raises WrongTokens for other differences.

        Args:
            run: what was run, for the message.
            by: the engine.
            requests: the requests.
            tokens: the engine's tokens for each of them.
            trusted: those of another engine: equal tokens need no further check.
            tolerance: what rounding explains.
        """
        num_close = 0
        hint = ": report this as a bug." if by == OURS else "."
        for number, ((prompt, output), found) in enumerate(zip(requests, tokens, strict=True)):
            if len(found) != output:
                raise WrongTokens(
                    f"{run}, request {number}: {by} generated {len(found)} tokens instead of "
                    f"{output}, so its time is meaningless{hint}"
                )
            if trusted is not None and found == trusted[number]:
                continue
            whole = (*prompt, *found)
            if whole not in self.seen:
                self.seen[whole] = self.shortfalls(prompt, found)
            short = self.seen[whole]
            for place, below in enumerate(short):
                if not below <= tolerance:  # written so that NaN is wrong too
                    raise WrongTokens(
                        f"{run}, request {number}: {by}'s token {place} is {found[place]}, which "
                        f"has a logit {below:.2g} below the likeliest by {self.name} (rounding "
                        f"explains {tolerance}), so its time is meaningless{hint}"
                    )
            num_close += trusted is not None or max(short) > 0
        return num_close
