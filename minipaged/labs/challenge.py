"""Lab 9, the open challenge: any policy that lowers latency, measured by the simulator.

It has no holes, no tests and no points. A student's file defines parts by fixed names, the
simulator serves two traces with these parts and with the library's own, and the result is a line
on a leaderboard.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minipaged.config import EngineConfig
from minipaged.engine.custom_parts import names_in_file
from minipaged.errors import InvalidOption
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel
from minipaged.evaluation.sim.simulator import Simulation
from minipaged.evaluation.sim.systems import LONGEST, Setting, System
from minipaged.evaluation.sim.traces import WORKLOADS, TraceRequest, chat_trace, poisson_trace
from minipaged.labs.referee import Referee
from minipaged.memory import BlockAllocator, BlockManager, Memory, PrefixCache
from minipaged.scheduler.fcfs import FCFSScheduler, youngest
from minipaged.scheduler.interface import Scheduler
from minipaged.utils.files import write_atomically

NUMBER = 9
TITLE = "the open challenge: lower latency at fixed memory"
FILE_NAME = "lab9_challenge.py"

NAMES = {
    "scheduler": "MyScheduler",
    "select_victim": "my_victim",
    "memory": "MyMemory",
    "prefix_cache": "MyPrefixCache",
    "allocator": "MyAllocator",
}
"""The names in a student's file, by part. Missing parts are the library's."""

SERVER = "opt-13b"
LONGEST_LEADERBOARD = 10 * 2**20  # bytes
SECONDS = 90.0  # duration of arrivals
PREFIX = 341  # tokens of the paper's longer shared prefix (section 6.4)

STARTER = '''\
"""Lab 9: the open challenge. Lower the latency that `minipaged lab challenge` prints.

An object with one of these names replaces the library's part; all are optional:

    MyScheduler    a class, called with (config, memory, select_victim)
    my_victim      a function: of the running groups that may be preempted, the one to preempt
    MyMemory       a class, called with the arguments of BlockManager, by keyword
    MyPrefixCache  a class derived from PrefixCache
    MyAllocator    a class, called with the number of blocks

The library's parts are in minipaged/scheduler/fcfs.py and minipaged/memory/. The rules and some
ideas are in tutorials/labs/09.md.
"""

from collections.abc import Sequence as Many

from minipaged.scheduler.fcfs import FCFSScheduler
from minipaged.scheduler.output import SchedulerOutput
from minipaged.sequence import SequenceGroup


def urgency(group: SequenceGroup) -> float:
    """Waiting groups join in ascending order of this number: here in order of arrival."""
    return group.arrival


class MyScheduler(FCFSScheduler):
    """The library's scheduler, except for the order in which waiting groups join."""

    def schedule(self) -> SchedulerOutput:
        self.waiting.sort(key=urgency)
        return super().schedule()


def my_victim(candidates: Many[SequenceGroup]) -> SequenceGroup:
    """The group to preempt when blocks run out: here the latest, as in the library."""
    return max(candidates, key=lambda group: group.arrival)
'''


@dataclass(frozen=True)
class Served:
    """The result of one policy on one trace: seconds per token, over all requests."""

    workload: str
    mean: float
    p50: float
    p90: float
    num_preemptions: int


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard.

    Args:
        score: mean latency over the baseline's, averaged over both workloads. Lower is better.
    """

    name: str
    date: str
    seed: int
    score: float
    served: list[dict[str, Any]]


# ---- serving -------------------------------------------------------------------------------------


def traces(seed: int) -> dict[str, list[TraceRequest]]:
    """Arrivals and lengths by workload, slightly above the rate that the library sustains well."""
    return {
        "assistant": [
            TraceRequest(r.arrival, r.input_len + PREFIX, r.output_len, PREFIX)
            for r in poisson_trace(WORKLOADS["sharegpt"], 2.6, SECONDS, seed)
            if r.input_len + PREFIX + r.output_len < LONGEST
        ],
        "chat": chat_trace(1.4, SECONDS, seed),
    }


def parts_of(file: Path) -> dict[str, Any]:
    """The parts that a student's file defines. Raises InvalidOption if there are none."""
    names = names_in_file(file)
    parts = {part: names[name] for part, name in NAMES.items() if name in names}
    if not parts:
        raise InvalidOption(
            f"{file} defines none of {', '.join(NAMES.values())}: use one of these names, or begin "
            f"with `minipaged lab start {NUMBER}`."
        )
    return parts


def serve(workload: str, trace: list[TraceRequest], parts: dict[str, Any]) -> Served:
    """Serve a trace with these parts; the others are the library's. Raises CheckFailed."""
    deployed = DEPLOYMENTS[SERVER]
    setting = Setting(deployed.num_slots, model=deployed.model, prefix_caching=True)
    referees: list[Referee] = []

    def scheduler(config: EngineConfig, memory: Memory) -> Scheduler:
        build: Callable[..., Scheduler] = parts.get("scheduler", FCFSScheduler)
        referees.append(
            Referee(build(config, memory, parts.get("select_victim", youngest)), setting)
        )
        return referees[0]

    system = System("yours", "yours", partial(_memory, parts), True, scheduler=scheduler)
    report = Simulation(system, setting, CostModel(deployed), trace, watch_memory=False).run()
    referees[0].see_the_end()
    latencies = sorted(request.normalized_latency for request in report.finished)
    return Served(
        workload,
        report.normalized_latency,
        latencies[len(latencies) // 2],
        latencies[len(latencies) * 9 // 10],
        report.num_preemptions,
    )


def _memory(parts: dict[str, Any], setting: Setting) -> Memory:
    build: Callable[..., Memory] = parts.get("memory", BlockManager)
    return build(
        num_blocks=setting.num_blocks,
        num_swap_blocks=setting.num_blocks,
        block_size=setting.block_size,
        watermark_blocks=int(setting.watermark * setting.num_blocks),
        allocator=parts.get("allocator", BlockAllocator),
        enable_prefix_caching=setting.prefix_caching,
        prefix_cache=parts.get("prefix_cache", PrefixCache),
    )


# ---- the leaderboard -----------------------------------------------------------------------------


def entry(name: str, seed: int, baseline: list[Served], yours: list[Served]) -> Entry:
    """The leaderboard entry of a run."""
    ratios = [mine.mean / theirs.mean for mine, theirs in zip(yours, baseline, strict=True)]
    score = round(sum(ratios) / len(ratios), 4)
    return Entry(name, time.strftime("%Y-%m-%d"), seed, score, [asdict(each) for each in yours])


def read_leaderboard(file: Path) -> list[Entry]:
    """All lines, the best first. Raises InvalidOption for an invalid file or line."""
    entries: list[Entry] = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        try:
            entries.append(_entry(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidOption(
                f"{file}, line {number}, is not an entry of a leaderboard: correct or remove the "
                "line."
            ) from error
    return sorted(entries, key=lambda one: one.score)


def _text(file: Path) -> str:
    """The text of a leaderboard; empty if there is none yet. Raises InvalidOption."""
    try:
        if not file.exists():
            return ""
        if file.stat().st_size > LONGEST_LEADERBOARD:
            raise InvalidOption(
                f"{file} has {file.stat().st_size:,} bytes, but a leaderboard has at most "
                f"{LONGEST_LEADERBOARD:,}: give another file."
            )
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidOption(f"{file} cannot be read ({error.strerror}): give a file.") from error
    except UnicodeDecodeError as error:
        raise InvalidOption(f"{file} is not text in UTF-8: give another file.") from error


def _entry(known: Any) -> Entry:
    """The entry, if all of its fields have the right types. Raises TypeError, ValueError."""
    one = Entry(**known)
    kinds = {"name": str, "date": str, "seed": int, "score": (int, float), "served": list}
    for name, kind in kinds.items():
        if not isinstance(getattr(one, name), kind) or isinstance(getattr(one, name), bool):
            raise TypeError(f"{name} is {getattr(one, name)!r}")
    if not abs(one.score) < 1e9:  # nor NaN
        raise ValueError(f"score is {one.score}")
    return one


def add_to_leaderboard(file: Path, one: Entry) -> list[Entry]:
    """Add a line and return all lines, the best first; the file is written atomically."""
    read_leaderboard(file)  # do not overwrite a damaged file
    before = _text(file)
    line = json.dumps(asdict(one)) + "\n"
    write_atomically(file, before + ("\n" if before and not before.endswith("\n") else "") + line)
    return read_leaderboard(file)
