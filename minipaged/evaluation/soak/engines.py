"""`minipaged soak engines`: random engines; each request is compared with itself served alone."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from minipaged.engine.parts import Parts
from minipaged.evaluation.soak.alone import Alone, make_tiny_model
from minipaged.evaluation.soak.run import Soak, describe
from minipaged.evaluation.soak.trial import Served, Trial
from minipaged.evaluation.soak.workload import Workload, draw_workload


class EnginesSoak(Soak):
    """Engines with random options that serve random requests.

    Engine i draws from seed + i, so one engine can be run again by itself.
    """

    command = "engines"
    unit = "random engines"

    def __init__(self, count: int, seed: int, parts: Parts | None = None) -> None:
        super().__init__(count, seed)
        self.num_requests = 0
        self.num_rounded = 0
        self.num_rejected = 0
        self.num_ran_out = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._parts = parts or Parts()

    def run(self) -> None:
        with _one_thread(), TemporaryDirectory() as name:
            self._folder = Path(name)
            make_tiny_model(self._folder)
            self._alone = Alone(self._folder)
            super().run()

    def run_some(self) -> None:
        """Run one engine."""
        seed = self.seed + self.num_done
        # The baselines refuse most custom parts, because they never call them.
        workload = draw_workload(seed, paged_only=bool(self._parts.replaced))
        trial = Trial(workload)
        try:
            trial.run(self._folder, self._parts)
        except Exception as error:
            self._note(seed, workload, describe(error))
        for served in trial.served:
            self._compare(seed, workload, served)
        self.num_requests += len(trial.served)
        self.num_rejected += trial.num_rejected
        self.num_ran_out += trial.num_ran_out
        self.num_preemptions += trial.num_preemptions
        self.num_cached_tokens += trial.num_cached_tokens
        self.num_done += 1

    def _compare(self, seed: int, workload: Workload, served: Served) -> None:
        max_model_len = workload.options["max_model_len"]
        difference = self._alone.difference(served, max_model_len)
        if difference is None:
            return
        if self._alone.is_rounding(served, max_model_len):
            self.num_rounded += 1
        else:
            request_id = served.output.request_id
            what = f"request {request_id}, {served.request.params}, has {difference}"
            self._note(seed, workload, what)

    def _note(self, seed: int, workload: Workload, what: str) -> None:
        options = ", ".join(f"{name}={value!r}" for name, value in workload.options.items())
        self.note(f"seed {seed}, {options}: {what}", seed, 1)

    def details(self) -> list[str]:
        happened = (
            f"{self.num_preemptions:,} preemptions, {self.num_cached_tokens:,} tokens found in the "
            f"prefix cache; too small a pool ended {self.num_ran_out:,} requests and refused "
            f"{self.num_rejected:,}"
        )
        rounded = (
            f"{self.num_rounded:,} requests differ only by float32 rounding, where two tokens are "
            "equally likely"
        )
        return [happened, rounded]

    def counts(self) -> str:
        return f"{super().counts()}, {self.num_requests:,} requests"

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {
            "requests": self.num_requests,
            "rounded": self.num_rounded,
            "refused": self.num_rejected,
            "ran_out_of_memory": self.num_ran_out,
            "preemptions": self.num_preemptions,
            "cached_tokens": self.num_cached_tokens,
        }


@contextmanager
def _one_thread() -> Generator[None]:
    """One thread: the matrices are so small that several threads would be slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
