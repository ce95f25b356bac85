"""`minipaged soak faults`: all scenarios by turns, with a fault at one place after another."""

from collections.abc import Iterator
from itertools import count
from random import Random

from minipaged.evaluation.soak.faults import Finding, inject
from minipaged.evaluation.soak.run import Soak
from minipaged.evaluation.soak.scenarios import Scenario, scenarios
from minipaged.llm import LLM


class FaultsSoak(Soak):
    """Injects `count` faults. A round has one at every place of every scenario."""

    command = "faults"
    unit = "injected faults"

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, seed)
        self.num_failed = 0
        self._places: set[str] = set()
        self._runs = [(each.name, self._rounds(each)) for each in scenarios()]

    def _rounds(self, scenario: Scenario) -> Iterator[Finding]:
        engine = LLM("storyteller", **scenario.options).engine
        for number in count():
            yield from inject(engine, scenario.calls, Random(f"{self.seed}/{number}"))

    def run_some(self) -> None:
        """One fault in the scenario whose turn it is."""
        name, findings = self._runs[self.num_done % len(self._runs)]
        finding = next(findings)
        self.num_done += 1
        self.num_failed += finding.num_failed
        self._places.add(finding.where)
        if finding.mismatch is not None:
            fault = type(finding.fault).__name__
            what = f"{name}, {fault} in {finding.where}: {finding.mismatch}"
            self.note(what, self.seed, self.num_done)

    def details(self) -> list[str]:
        places = f"{len(self._places):,} places in {len(self._runs)} scenarios"
        return [f"{places}; {self.num_failed:,} requests whose own code raised ended with an error"]
