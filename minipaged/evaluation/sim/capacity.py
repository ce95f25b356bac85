"""The request rate that a system sustains: where its normalised latency crosses a threshold."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from minipaged.errors import InvalidOption

THRESHOLDS = (0.1, 0.2, 0.5)  # seconds per token; the paper names none, but its curves bend between
WIDER = 1.3  # the factor between searched rates
FARTHEST = 1e4  # largest search range: the guess times or divided by this


@dataclass
class Curve:
    """Normalised latency by rate, simulated only at the rates that are needed.

    It rises with the rate: slowly at first, then without bound.

    Args:
        latency: seconds per token by rate in requests per second; infinite if it is unknown but
            too long.
        guess: the first rate.
        near: the search ends when the bounds are at most this factor apart.
    """

    latency: Callable[[float], float]
    guess: float
    near: float = 1.03
    points: dict[float, float] = field(default_factory=dict[float, float])  # latency by rate

    def at(self, rate: float) -> float:
        """Return the latency at this rate, computed once."""
        if rate not in self.points:
            self.points[rate] = self.latency(rate)
        return self.points[rate]

    def crossing(self, threshold: float) -> float:
        """Find the rate at which latency crosses the threshold, to half of `near`.

        Raises InvalidOption if it is on the same side at all rates that are tried.
        """
        self.at(self.guess)
        low = max((r for r, s in self.points.items() if s <= threshold), default=0.0)
        high = min((r for r, s in self.points.items() if s > threshold and r > low), default=0.0)
        while not low or not high:
            rate = low * WIDER if low else high / WIDER
            if not 1 / FARTHEST < rate / self.guess < FARTHEST:
                raise InvalidOption(
                    f"a token takes {'less' if low else 'more'} than {threshold:.3g} s at "
                    f"{rate:.2g} requests per second: no rate can be found."
                )
            if self.at(rate) <= threshold:
                low = rate
            else:
                high = rate
        while high / low > self.near:
            middle = (low * high) ** 0.5
            if self.at(middle) <= threshold:
                low = middle
            else:
                high = middle
        return (low * high) ** 0.5

    def crossings(self, thresholds: Iterable[float]) -> dict[float, float]:
        """Find the rates for several thresholds, the lowest first."""
        return {t: self.crossing(t) for t in sorted(thresholds)}
