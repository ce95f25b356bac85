"""The engine: every `step()` computes one token, or a chunk of prompt, per running sequence."""

import random
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any

import torch

from minipaged.config import EngineConfig
from minipaged.engine import overlap
from minipaged.engine.arrivals import CheckedRequest, RequestBuilder, check_request, refuse_id
from minipaged.engine.broken_logits import leave_out_broken
from minipaged.engine.launched_step import LaunchedStep, rows_to_sample, step_input
from minipaged.engine.metrics import StepStats
from minipaged.engine.open_request import OpenRequest, end_early
from minipaged.engine.outputs import CachedPrefix, Progress, RequestOutput
from minipaged.engine.prefixes import PinnedPrefixes
from minipaged.engine.request import Arrival, ModelTraits, Request
from minipaged.engine.sampling_request import SamplingRequest
from minipaged.engine.vllm_names import EngineNames
from minipaged.errors import InvalidRequest
from minipaged.memory import MemoryView
from minipaged.sampling import Params, SamplingParams
from minipaged.sampling.sampler import Sampler
from minipaged.scheduler.interface import Scheduler
from minipaged.scheduler.output import SchedulerOutput
from minipaged.sequence import Sequence
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.prompts import Prompt, read_prompt
from minipaged.utils.device import to_device
from minipaged.utils.vllm_options import refuse_call_options
from minipaged.worker.executor import Executor

Listener = Callable[[SchedulerOutput, StepStats], None]


class LLMEngine(EngineNames):
    """Accepts requests at any time; each step returns the progress of those that advanced.

    The engine owns the requests and their texts; queues belong to the scheduler, blocks to the
    memory, tensors to the executor. Only one thread at a time may call it. Every call is atomic: if
    an exception or Ctrl-C interrupts one, the engine builds a new scheduler and memory, and open
    requests continue from their present tokens (see `open_request`).
    """

    def __init__(
        self,
        config: EngineConfig,
        build_scheduler: Callable[[], Scheduler],
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        sampling_request: Callable[[Arrival, SamplingParams, int], Request] = SamplingRequest,
        sampler: Sampler | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.scheduler = build_scheduler()
        self.executor = executor
        self.tokenizer = tokenizer
        self.sampler = sampler or Sampler()
        self.listeners: list[Listener] = []
        """Called in each step, before anything is freed. They must not change the engine."""
        self.last_step: tuple[int, list[Progress]] = (0, [])
        """The number and the result of the last complete step, even if Ctrl-C hit its return."""
        self._build_scheduler = build_scheduler
        self._sampling_request = sampling_request
        self.traits = ModelTraits.of(executor.runner.model.config, config.max_model_len, tokenizer)
        self._open: dict[str, OpenRequest] = {}
        self.prefixes = PinnedPrefixes()
        self._seq_ids = count()
        self._seeds = random.Random(seed)  # for requests without a seed
        self._clock = clock
        self._faults: dict[str, Exception] = {}  # by request id: exceptions of its own code
        self._is_cut_short = False  # a change has begun and is not complete
        self._launched: LaunchedStep | None = None  # the next step, if it is launched already

    @property
    def memory(self) -> MemoryView:
        """The read-only view of the memory."""
        return self.scheduler.memory

    # ---- one step, in the order a token travels --------------------------------------------------

    def step(self) -> list[Progress]:
        """Compute one step; returns the progress of each request that advanced or ended.

        `progress.output()` returns the `RequestOutput` with all tokens of the request so far.

        If the code of one request raises (the tokenizer on its tokens, a custom part that samples
        for it), that request ends, and its progress has the `error`, a RequestFailed. The others
        continue.

        After any other exception, or Ctrl-C, the step is undone: the next call computes the same
        keys and values again and samples the same tokens. If the model itself raises, the cause is
        not attributed to a request, and it may raise again until the faulty request is aborted.

        With `async_scheduling`, the next step is launched before the results of this one are read
        (see `overlap`). It is the step that the next call returns.
        """
        with self._change():
            step, self._launched = self._launched, None
            if step is None:
                step = self._launch()
            else:
                overlap.leave_out_ended(step, self._open)
            if self.config.async_scheduling and self._may_look_ahead(step):
                overlap.look_ahead(step)
                self._launched = self._launch(after=step)
            self._commit(step)
            if not self._open:
                self._launched = None  # all of its sequences have ended
        return self.last_step[1]

    @contextmanager
    def _change(self, harmless: type[Exception] | tuple[()] = ()) -> Generator[None]:
        """Make a change atomic. A `harmless` exception is raised before any change."""
        if self._is_cut_short:
            self.restart()
        self._is_cut_short = True
        try:
            yield
        except harmless:
            self._is_cut_short = False
            raise
        except BaseException:
            with suppress(Exception):  # if this is interrupted as well, the next change restarts
                self.restart()
            raise
        self._is_cut_short = False

    def _launch(self, after: LaunchedStep | None = None) -> LaunchedStep:
        """Schedule a step and start it on the device.

        Args:
            after: the last step, if its results have not been read.
        """
        times = [self._clock()]
        decision = self.scheduler.schedule()  # which sequences run, how many tokens each
        times.append(self._clock())
        step = step_input(decision, self.scheduler.memory.tables, self._open, times[-1])
        rows = rows_to_sample(decision, step, self._open, self._faults)
        pending = () if after is None else (after.draws.token_ids,)
        logits = self.executor.run(step, *pending)  # [rows, vocab]: the device side
        if rows.of_prompts:
            rows.note_prompt_logits(logits, self._faults)
        if rows.indices != list(range(len(logits))):
            logits = logits[to_device(rows.indices, logits.device, torch.long)]  # [rows, vocab]
        draws = self.sampler.sample(logits, rows.for_sampler)  # the next tokens
        times.append(self._clock())
        return LaunchedStep(decision, rows.counts, draws, times, decision.sequences)

    def _may_look_ahead(self, step: LaunchedStep) -> bool:
        return not self._faults and overlap.may_look_ahead(step, self.scheduler, self._open)

    def _commit(self, step: LaunchedStep) -> None:
        """Read and record what was computed; let requests fork or end; free ended sequences."""
        sampled, broken = step.read()  # by request, by sequence
        decision, times = step.decision, [*step.times, self._clock()]
        if step.is_followed:
            overlap.arrive(step)
        if broken:  # these end with an error, and the others continue
            decision = leave_out_broken(decision, broken, self._open, self.scheduler)
        number = self.last_step[0] + 1
        progresses: list[Progress] = []
        self.scheduler.commit(decision)
        if self.listeners:
            stats = StepStats.of(number, self.scheduler, decision, times)
            for listener in self.listeners:
                listener(decision, stats)
        for request_id, tokens in sampled.items():
            if request_id in self._faults:
                continue
            request = (open_request := self._open[request_id]).request
            request.last_token_time = times[-1]
            if request.first_token_time is None:
                request.first_token_time = times[-1]
            for seq_id, of_seq in tokens.items():
                for token in of_seq:
                    open_request.history += (number, seq_id, *token)
            try:
                ended = request.advance(tokens, partial(self._fork, open_request))
                progress = request.progress()
            except Exception as error:
                self._faults.setdefault(request_id, error)
                continue
            for seq in ended:
                self.scheduler.finish(request.group, seq)
            if progress is not None:
                progresses.append(progress)
        if decision.ended or self._faults:
            progresses += end_early(decision.ended, self._open, self._faults)
        for progress in progresses:
            if progress.finished:
                open_request = self._open[progress.request_id]
                open_request.ended_in, open_request.request.finished_time = number, times[-1]
        self.last_step = (number, progresses)  # before this assignment, all can be undone
        for progress in progresses:
            if progress.finished:
                del self._open[progress.request_id]
        if self.prefixes.lost:
            self.prefixes.pin_again(self.scheduler.memory)
        queues = (self.scheduler.running, self.scheduler.waiting, self.scheduler.swapped)
        assert any(queues) or not self._open, f"the scheduler has lost {', '.join(self._open)}"
        if self._faults:  # their forks may be incomplete
            self.restart()

    def _fork(self, open_request: OpenRequest, parent: Sequence) -> Sequence:
        child = self.scheduler.fork(open_request.request.group, parent, next(self._seq_ids))
        open_request.forked.append(child.seq_id)
        return child

    def restart(self) -> None:
        """Build a new scheduler and memory, and queue every open request to be recomputed."""
        self._faults, self._launched = {}, None
        self.scheduler = self._build_scheduler()
        last_step, _ = self.last_step
        self._open = {name: one for name, one in self._open.items() if one.ended_in > last_step}
        for request_id, open_request in self._open.items():
            try:
                self.scheduler.add(open_request.rebuild(last_step))
            except Exception as error:
                self._faults[request_id] = error  # the next step reports it
        self.prefixes.lose_all()
        self._is_cut_short = False

    # ---- adding and aborting requests ------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: Prompt | CheckedRequest,
        params: Params | None = None,
        **others: Any,
    ) -> None:
        """Queue a prompt (text or token ids) for sampling or, with BeamSearchParams, beam search.

        The prompt may already have been checked by another thread. `others` are further arguments
        of vLLM's add_request, accepted only with neutral values.

        Raises InvalidRequest, PromptTooLong, InvalidOption or MissingTokenizer if the request can
        never be served; other requests continue.
        """
        refuse_call_options(others)
        if not isinstance(prompt, CheckedRequest):
            prompt = check_request(prompt, params, self.traits, self.config.max_logprobs)
        refuse_id(request_id, self._open)
        group = prompt.first_group(request_id, next(self._seq_ids))
        with self._change(harmless=InvalidRequest):
            self.scheduler.add(group)
            seed = self._seeds.getrandbits(63)  # always, so that requests' seeds are independent
            build = RequestBuilder(prompt.params, seed, self._sampling_request)
            arrival = Arrival(group, prompt.prompt, self.traits, self._clock())
            self._open[request_id] = OpenRequest(arrival, build)

    def abort_request(self, request_id: str | Iterable[str]) -> RequestOutput | None:
        """End a request and return its output so far; None if it is unknown, or for several ids."""
        if not isinstance(request_id, str):
            for each in list(request_id):
                self.abort_request(each)
            return None
        with self._change():
            open_request = self._open.pop(request_id, None)
            if open_request is None:
                return None
            self.scheduler.abort(open_request.arrival.group)
        open_request.request.finished_time = self._clock()
        open_request.request.finish_all("abort")
        return open_request.request.output()

    # ---- pinned prefixes (section 4.4, shared prefix) --------------------------------------------

    def pin_prefix(self, prompt: Prompt) -> CachedPrefix | None:
        """Pin the blocks of a computed prefix; None if it is not in the cache."""
        read = read_prompt(prompt, self.tokenizer, self.config.max_model_len)
        seq = Sequence(next(self._seq_ids), read.token_ids, cache_salt=read.cache_salt)
        with self._change(harmless=InvalidRequest):
            return self.prefixes.pin(seq, self.scheduler.memory)

    def release_prefix(self, prefix: CachedPrefix) -> None:
        """Release a pinned prefix, whose blocks may then be evicted."""
        with self._change(harmless=InvalidRequest):
            self.prefixes.release(prefix, self.scheduler.memory)
