"""`minipaged soak faults`: all scenarios in turn, with a fault at one place after another."""

from collections.abc import Iterator
from itertools import count
from random import Random

from minipaged.evaluation.soak.faults import Finding, inject
from minipaged.evaluation.soak.run import Soak, describe
from minipaged.evaluation.soak.scenarios import Scenario, scenarios
from minipaged.llm import LLM


class FaultsSoak(Soak):
    """Injects `count` faults. A round has one fault at every place of every scenario."""

    command = "faults"
    unit = "injected faults"

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, seed)
        self.num_failed = 0
        self._places: set[str] = set()
        self._scenarios = scenarios()
        self._rounds = [self._run(scenario) for scenario in self._scenarios]

    def _run(self, scenario: Scenario) -> Iterator[Finding]:
        engine = LLM("storyteller", **scenario.options).engine
        for number in count():
            yield from inject(engine, scenario.calls, Random(f"{self.seed}/{number}"))

    def run_some(self) -> None:
        """Inject one fault in the next scenario."""
        turn = self.num_done % len(self._scenarios)
        scenario = self._scenarios[turn]
        self.num_done += 1
        try:
            finding = next(self._rounds[turn])
        except Exception as error:  # the engine itself detected it
            self.note(f"{scenario.name}: {describe(error)}", self.seed, self.num_done)
            self._rounds[turn] = self._run(scenario)
            return
        self.num_failed += finding.num_failed
        self._places.add(finding.where)
        if finding.mismatch is not None:
            what = f"{type(finding.fault).__name__} in {finding.where}: {finding.mismatch}"
            self.note(f"{scenario.name}, {what}", self.seed, self.num_done)

    def details(self) -> list[str]:
        places = f"{len(self._places):,} places in {len(self._scenarios)} scenarios"
        return [f"{places}; {self.num_failed:,} requests whose own code raised ended with an error"]
