"""The rate of requests that a system can bear: where its normalised latency crosses a threshold."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from minipaged.errors import InvalidOption

THRESHOLDS = (0.1, 0.2, 0.5)  # seconds per token; the paper names none, its curves rise in between
WIDER = 1.3  # by this factor, bounds are looked for
FARTHEST = 1e4  # times the guess, or that part of it: the limits of the search


@dataclass
class Curve:
    """Normalised latency by rate, looked at where it is needed.

    It rises with the rate: slowly, and beyond what the system can bear without end.

    Args:
        latency: seconds per token at a rate in requests per second; infinite if too long to tell.
        guess: a rate to begin with.
        near: bounds are near enough if they are no more than this factor apart.
    """

    latency: Callable[[float], float]
    guess: float
    near: float = 1.03
    points: dict[float, float] = field(default_factory=dict[float, float])  # latency by rate

    def at(self, rate: float) -> float:
        """The latency at this rate, computed once."""
        if rate not in self.points:
            self.points[rate] = self.latency(rate)
        return self.points[rate]

    def crossing(self, threshold: float) -> float:
        """The rate at which latency passes the threshold, to half of `near`.

        Raises InvalidOption if it is on the same side of it at all rates that are looked at.
        """
        self.at(self.guess)
        low = max((r for r, s in self.points.items() if s <= threshold), default=0.0)
        high = min((r for r, s in self.points.items() if s > threshold and r > low), default=0.0)
        while not low or not high:
            rate = low * WIDER if low else high / WIDER
            if not 1 / FARTHEST < rate / self.guess < FARTHEST:
                raise InvalidOption(
                    f"a token takes {'less' if low else 'more'} than {threshold:.3g} s at "
                    f"{rate:.2g} requests per second still: there is no rate to be found."
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
        """The same for several thresholds, the lowest first."""
        return {t: self.crossing(t) for t in sorted(thresholds)}
