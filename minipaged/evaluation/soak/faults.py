"""Faults at every point: an exception or Ctrl-C at the entry or return of a function.

A scenario is a list of calls to an engine: add requests, run steps, abort requests, pin prefixes.
It runs once without faults, to count its boundaries: the entries and returns of the library's
functions. Then it runs with a fault at one of them, and continues after the fault. Invariants:

    every request ends with the tokens, texts and log-probabilities of the run without faults; a
    request whose own code raised ends with RequestFailed instead, which names the fault
    the reports of the steps add up to the outputs, without losses or duplicates
    in the end all blocks are free
"""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import CO_GENERATOR
from math import isclose
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.outputs import CompletionOutput, Progress, RequestOutput
from minipaged.errors import RequestFailed
from minipaged.sampling import Params
from minipaged.tokenizer.prompts import Prompt

PACKAGE = Path(__file__).parents[2]
HARNESS = Path(__file__).parent
Call = Callable[["Run"], object]
LITTLE_LATER = 3000
"""Maximum number of boundaries between two faults: about four steps."""


class InjectedError(Exception):
    """The exception of an injected fault other than KeyboardInterrupt."""


@dataclass
class Injector:
    """Raises a fault at the boundaries of these numbers."""

    fault: BaseException | None = None
    boundaries: tuple[int, ...] = ()  # counted from 1
    num_passed: int = 0
    where: str | None = None
    """The place of the first fault, as "scheduler.fcfs.FCFSScheduler.schedule, return"."""
    places: dict[str, list[int]] | None = None
    """If given, receives the boundaries by place."""

    @contextmanager
    def active(self) -> Generator[None]:
        """Count the boundaries inside."""
        before = sys.getprofile()
        sys.setprofile(self._pass)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _pass(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not _is_ours(code.co_filename):
            return
        if code.co_flags & CO_GENERATOR and (event == "return" or code.co_name == "<genexpr>"):
            return  # no signal arrives there, and a closing generator must not raise
        self.num_passed += 1
        if self.places is not None:
            self.places.setdefault(_place(frame, event), []).append(self.num_passed)
        if self.num_passed in self.boundaries and self.fault is not None:
            self.where = self.where or _place(frame, event)
            raise self.fault


def _place(frame: FrameType, event: str) -> str:
    module = frame.f_globals["__name__"].removeprefix("minipaged.")
    name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # from Python 3.11 on
    return f"{module}.{name}, {event}"


_ours: dict[str, bool] = {}  # by file


def _is_ours(file: str) -> bool:
    if file not in _ours:
        path = Path(file)
        _ours[file] = path.is_relative_to(PACKAGE) and not path.is_relative_to(HARNESS)
    return _ours[file]


@dataclass
class Run:
    """One run of a scenario, with the reports of its requests."""

    engine: LLMEngine
    outputs: dict[str, RequestOutput] = field(default_factory=dict[str, RequestOutput])
    errors: dict[str, RequestFailed] = field(default_factory=dict[str, RequestFailed])
    pieces: dict[tuple[str, int], tuple[list[int], str]] = field(
        default_factory=dict[tuple[str, int], tuple[list[int], str]]
    )
    """The tokens and text reported by the steps, by request and completion."""
    num_steps_read: int = 0

    def read(self) -> None:
        """Collect the report of the last step, unless it was collected before."""
        number, progresses = self.engine.last_step
        if number == self.num_steps_read:
            return
        self.num_steps_read = number
        for progress in progresses:
            self._take(progress)

    def _take(self, progress: Progress) -> None:
        for new in progress.new:
            tokens, text = self.pieces.get((progress.request_id, new.completion), ([], ""))
            piece = (tokens + new.token_ids, text + new.text)
            self.pieces[progress.request_id, new.completion] = piece
        if progress.error is not None:
            self.errors[progress.request_id] = progress.error
        elif progress.finished:
            self.outputs[progress.request_id] = progress.build_output()

    # ---- calls -----------------------------------------------------------------------------------

    def make(self, call: Call, injector: Injector) -> None:
        """Make a call, and repeat it if it is interrupted."""
        while True:
            try:
                with injector.active():
                    call(self)
                return
            except (InjectedError, KeyboardInterrupt):
                if injector.where is None:  # a real error
                    raise
            finally:
                self.read()


def add(name: str, prompt: Prompt, params: Params) -> Call:
    """Add a request."""

    def call(run: Run) -> None:
        if name not in run.engine.unfinished_request_ids:
            run.engine.add_request(name, prompt, params)

    return call


def abort(name: str) -> Call:
    """Abort a request."""
    return lambda run: run.engine.abort_request(name)


def pin(prompt: Prompt) -> Call:
    """Pin a prefix, if it is in the cache."""
    return lambda run: run.engine.prefixes.pinned or run.engine.pin_prefix(prompt)


def release(run: Run) -> None:
    """Release all pinned prefixes."""
    for prefix in run.engine.prefixes.pinned:
        run.engine.release_prefix(prefix)


def step(run: Run) -> None:
    """Run a step."""
    run.engine.step()


@dataclass(frozen=True)
class Finding:
    """One run with a fault."""

    where: str
    fault: BaseException
    num_failed: int  # requests that ended with an error
    mismatch: str | None


def inject(engine: LLMEngine, calls: list[Call], rng: Random) -> Iterator[Finding]:
    """Run the scenario repeatedly, with a fault at each place, in random order.

    A place is passed many times. One passage is chosen at random, and the fault alternates between
    an exception and Ctrl-C. A second Ctrl-C follows soon, possibly in the same step.
    """
    counting = Injector(places={})
    undisturbed = perform(engine, calls, counting)
    assert counting.places is not None
    places = list(counting.places.values())
    rng.shuffle(places)
    for number, boundaries in enumerate(places):
        boundary = rng.choice(boundaries)
        injector = Injector(InjectedError("an injected fault"), (boundary,))
        if number % 2:
            second = boundary + rng.randint(1, LITTLE_LATER)
            injector = Injector(KeyboardInterrupt(), (boundary, second))
        run = perform(engine, calls, injector)
        mismatch = compare(run, undisturbed, injector)
        assert injector.where is not None, "the run has fewer boundaries than the undisturbed one"
        assert injector.fault is not None
        yield Finding(injector.where, injector.fault, len(run.errors), mismatch)


def perform(engine: LLMEngine, calls: list[Call], injector: Injector) -> Run:
    """Make the calls, then step until every request has ended."""
    engine.restart()  # clear the prefix cache of the last run
    run = Run(engine, num_steps_read=engine.last_step[0])
    for call in calls:
        run.make(call, injector)
    while engine.has_unfinished_requests():
        run.make(step, injector)
    return run


def compare(run: Run, undisturbed: Run, injector: Injector) -> str | None:
    """Describe what the fault has changed; None if the invariants hold."""
    for name, expected in undisturbed.outputs.items():
        if name in run.errors:
            if run.errors[name].__cause__ is not injector.fault:
                return f"request {name} has ended with {run.errors[name]!r}"
        elif name not in run.outputs:
            return f"request {name} has not ended"
        elif difference := _difference(run.outputs[name], expected):
            return f"request {name}: {difference}"
    if len(run.errors) > 1:
        return f"{len(run.errors)} requests have ended with an error: {sorted(run.errors)}"
    for (name, index), piece in run.pieces.items():
        if name in run.outputs:
            completion = run.outputs[name].outputs[index]
            if piece != (completion.token_ids, completion.text):
                return f"request {name}: the steps reported {piece}, but its output is {completion}"
    memory = run.engine.memory
    if (
        memory.num_free != memory.num_blocks
        or memory.num_free_swap_blocks != memory.num_swap_blocks
    ):
        return f"{memory.num_free} of {memory.num_blocks} blocks are free in the end"
    return None


def _difference(found: RequestOutput, expected: RequestOutput) -> str | None:
    for one, other in zip(found.outputs, expected.outputs, strict=True):
        for name in ("token_ids", "text", "finish_reason", "stop_reason"):
            if getattr(one, name) != getattr(other, name):
                return f"{name} is {getattr(one, name)!r}, but was {getattr(other, name)!r}"
        if not _are_close(_numbers(one), _numbers(other)):
            return "the log-probabilities differ"
    if not _are_close(_prompt_numbers(found), _prompt_numbers(expected)):
        return "the log-probabilities of the prompt differ"
    return None


def _numbers(completion: CompletionOutput) -> list[float]:
    tokens = completion.logprobs or []
    return [completion.cumulative_logprob, *(p.logprob for token in tokens for p in token.values())]


def _prompt_numbers(output: RequestOutput) -> list[float]:
    tokens = [token for token in output.prompt_logprobs or [] if token]
    return [p.logprob for token in tokens for p in token.values()]


def _are_close(numbers: list[float], others: list[float]) -> bool:
    """Equal up to rounding, which differs if keys and values are recomputed."""
    pairs = zip(numbers, others, strict=False)
    return len(numbers) == len(others) and all(isclose(a, b, abs_tol=5e-3) for a, b in pairs)
