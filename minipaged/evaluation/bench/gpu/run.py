"""Runs the stages of `minipaged bench gpu`, such that no failure costs more than its own part.

The time on a GPU may be short, and no later run may follow. Therefore

    rows      are yielded as soon as they are finished, each with its stage and part
    failures  are rows too, and the next part is measured
    time      left is divided among the remaining stages. A stage whose time is used up is cut
              short; a part that does not end is ended with its process
    process   the measuring process (`child`) is started again if it has ended
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from minipaged.evaluation.bench.asked_process import AskedProcess, ProcessEnded
from minipaged.evaluation.bench.gpu.stage import Stage

Row = dict[str, Any]
CHILD = "minipaged.evaluation.bench.gpu.child"
GRACE = 30.0  # seconds after a stage's time, until its last part is ended
ON_CPU = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def measure(
    stages: Sequence[Stage], module: str, budget: float, is_dry: bool, grace: float = GRACE
) -> Iterator[Row]:
    """Run the stages and yield each row when it is finished.

    Args:
        stages: the stages to run, of those in `module`.
        module: the name of the module whose STAGES the measuring process imports.
        budget: seconds for all of them.
        is_dry: on the CPU, with tiny inputs.
        grace: see GRACE.
    """
    begin = time.monotonic()
    common = {"run": datetime.now().isoformat(timespec="seconds"), "dry_run": is_dry}
    with _Child(module, is_dry) as child:
        for number, stage in enumerate(stages):
            left = begin + budget - time.monotonic()
            share = stage.seconds / sum(each.seconds for each in stages[number:])
            for row in _measure_stage(child, stage.name, max(0.0, left * share), grace):
                after = round(time.monotonic() - begin, 1)
                yield {**common, "after": after, "stage": stage.name, **row}


def _measure_stage(child: "_Child", stage: str, seconds: float, grace: float) -> Iterator[Row]:
    begin = time.monotonic()

    def left() -> float:
        return begin + seconds - time.monotonic()

    try:
        parts: list[str] = child.ask("parts", within=left() + grace, stage=stage)
    except ProcessEnded as error:
        yield {"status": "failed", "part": "", "failure": str(error)}
        return
    for number, part in enumerate(parts):
        if left() < 0:
            rest = f"{len(parts) - number} of {len(parts)} parts"
            why = f"the {seconds:.0f} s of this stage are used up: {rest} are left out"
            yield {"status": "cut short", "part": part, "failure": why}
            break
        try:
            found = child.ask("measure", within=left() + grace, stage=stage, part=number)
        except ProcessEnded as error:
            yield {"status": "failed", "part": part, "failure": str(error)}
            continue
        for row in found["rows"]:
            yield {"status": "measured", "part": part, **row}
        if found["failure"]:
            texts = {"failure": found["failure"], "trace": found["trace"]}
            yield {"status": "failed", "part": part, **texts}
        if found["is_lost"]:
            child.end()
    yield {"status": "finished", "took": round(time.monotonic() - begin, 1)}


class _Child:
    """The measuring process; the next request starts another one after it has ended."""

    def __init__(self, module: str, is_dry: bool) -> None:
        self._options = {"stages": module, "is_dry": is_dry}
        self._environment = ON_CPU if is_dry else {}
        self._process: AskedProcess | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, do: str, within: float, **given: Any) -> Any:
        """Send a request and return the answer. Raises ProcessEnded."""
        if self._process is None:
            process = AskedProcess(CHILD, self._options, self._environment)
            self._process = self._stack.enter_context(process)
        try:
            return self._process.ask(do, within, **given)
        except ProcessEnded:
            self.end()
            raise

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        self._stack.close()


def saved(rows: Iterable[Row], file: Path | None) -> Iterator[Row]:
    """Pass rows on; each has been appended to the file before."""
    if file is None:
        yield from rows
        return
    with file.open("a", encoding="utf-8") as lines:
        for row in rows:
            print(json.dumps(row), file=lines, flush=True)
            yield row


def read(file: Path) -> list[Row]:
    """The rows in a file: of each stage, those of the last run that has it."""
    rows: list[Row] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    last = {row["stage"]: row["run"] for row in rows}
    return [row for row in rows if row["run"] == last[row["stage"]]]
