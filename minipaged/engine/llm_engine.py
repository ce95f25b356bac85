"""The engine: every `step()` computes one more token, or a chunk of prompt, of what runs."""

import random
import time
from collections.abc import Callable
from functools import partial
from itertools import count

import torch
from torch import Tensor

from minipaged.config import EngineConfig
from minipaged.engine.beam_request import BeamRequest
from minipaged.engine.outputs import CachedPrefix, Progress, RequestOutput, StepStats
from minipaged.engine.request import Arrival, ModelTraits, Request
from minipaged.engine.sampling_request import SamplingRequest
from minipaged.errors import InvalidRequest, MissingTokenizer
from minipaged.memory import MemoryView
from minipaged.sampling import BeamSearchParams, Params, SamplingParams
from minipaged.sampling.sampler import SampledToken, Sampler, SamplingRow
from minipaged.scheduler.interface import Scheduler
from minipaged.scheduler.output import SchedulerOutput, SequenceInput, StepInput
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.prompts import Prompt, TokenizedPrompt, read_prompt
from minipaged.utils.device import to_device
from minipaged.worker.model_runner import ModelRunner

Sampled = dict[str, dict[int, list[SampledToken]]]  # by request id, by sequence id
Listener = Callable[[SchedulerOutput, StepStats], None]


class LLMEngine:
    """Requests go in at any time; each step returns the progress of those that advanced.

    The engine owns the requests and their texts. Queues belong to the scheduler, blocks to the
    memory below it, tensors to the runner.
    """

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        *,
        sampling_request: Callable[[Arrival, SamplingParams, int], Request] = SamplingRequest,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.sampler = Sampler()
        self.listeners: list[Listener] = []
        """Called in each step once its keys and values are written, before anything is freed."""
        self._sampling_request = sampling_request
        eos_token_ids = runner.model.config.eos_token_ids
        self._traits = ModelTraits(tokenizer, eos_token_ids, config.max_model_len)
        self._requests: dict[str, Request] = {}
        self._prefixes: dict[CachedPrefix, Sequence] = {}  # the pinned ones
        self._seq_ids = count()
        self._seeds = random.Random(seed)  # for requests that bring no seed of their own
        self._clock = clock
        self._num_steps = 0

    @property
    def memory(self) -> MemoryView:
        """Which sequence holds which blocks, for reading only."""
        return self.scheduler.memory

    # ---- one step, in the order a token travels ------------------------------------------------

    def step(self) -> list[Progress]:
        """Compute one step; returns what is new of each request that advanced or ended.

        `progress.output()` gives the `RequestOutput` with all that the request has so far.
        """
        times = [self._clock()]
        decision = self.scheduler.schedule()  # which sequences run, how many tokens each
        times.append(self._clock())
        step = self._step_input(decision)  # the same in plain numbers
        logits = self.runner.run(step)  # [rows, vocab]: the device side
        times.append(self._clock())
        sampled = self._sample(decision, step, logits)  # by request, by sequence
        times.append(self._clock())
        return self._commit(decision, sampled, times)

    def _step_input(self, decision: SchedulerOutput) -> StepInput:
        """The decision in plain numbers: the message to the device side (section 4.6)."""
        tables = self.scheduler.memory.tables
        sequences: list[SequenceInput] = []
        for group, seq, num_new_tokens, samples in decision.sequences:
            request, start = self._requests[group.request_id], seq.num_computed_tokens
            num_logits = 1 if samples else 0
            if request.num_prompt_logprobs is not None and request.wants_prompt_logits(seq):
                num_logits = num_new_tokens
            new = seq.token_ids[start : start + num_new_tokens]
            blocks = tables[seq.seq_id].blocks.copy()
            sequences.append(SequenceInput(seq.seq_id, new, start, blocks, num_logits))
        return StepInput(tuple(sequences), decision.swap_out, decision.swap_in, decision.copies)

    def _sample(self, decision: SchedulerOutput, step: StepInput, logits: Tensor) -> Sampled:
        """Choose the next token of every sequence of which nothing is left to compute.

        Several tokens for a prompt with several samples: they are drawn from the same logits.
        """
        rows: list[SamplingRow] = []
        row_indices: list[int] = []
        owners: list[tuple[str, int, int]] = []  # request, sequence, number of rows
        stop = 0
        for scheduled, sequence in zip(decision.sequences, step.sequences, strict=True):
            group, seq, _, samples = scheduled
            request = self._requests[group.request_id]
            start, stop = stop, stop + sequence.num_logits
            if request.num_prompt_logprobs is not None:
                request.note_prompt_logits(seq, logits[start:stop])
            if samples:
                wanted = request.rows(seq)
                rows += wanted
                row_indices += [stop - 1] * len(wanted)
                owners.append((group.request_id, seq.seq_id, len(wanted)))
        if row_indices != list(range(logits.shape[0])):
            logits = logits[to_device(row_indices, logits.device, torch.long)]  # [rows, vocab]
        tokens, start = self.sampler.sample(logits, rows), 0
        sampled: Sampled = {}
        for request_id, seq_id, num_rows in owners:
            sampled.setdefault(request_id, {})[seq_id] = tokens[start : start + num_rows]
            start += num_rows
        return sampled

    def _commit(
        self, decision: SchedulerOutput, sampled: Sampled, times: list[float]
    ) -> list[Progress]:
        """Note what was computed, fork and go on as each request decides, free what has ended."""
        scheduler, now = self.scheduler, times[-1]
        scheduler.commit(decision)
        if self.listeners:
            self._report(decision, times)
        changed: list[Request] = []
        for request_id, tokens in sampled.items():
            request = self._requests[request_id]
            request.last_token_time = now
            if request.first_token_time is None:
                request.first_token_time = now
            for seq in request.advance(tokens, partial(self._fork, request.group)):
                scheduler.finish(request.group, seq)
            changed.append(request)
        for group in decision.ended:
            request = self._requests[group.request_id]
            request.finish_all("length")
            changed.append(request)
        progresses: list[Progress] = []
        for request in changed:
            progress = request.progress()
            if progress is not None:
                progresses.append(progress)
                if progress.finished:
                    del self._requests[progress.request_id]
        if self._requests:
            queued = scheduler.running or scheduler.waiting or scheduler.swapped
            assert queued, f"the scheduler has lost {', '.join(self._requests)}: they would hang"
        return progresses

    def _fork(self, group: SequenceGroup, parent: Sequence) -> Sequence:
        return self.scheduler.fork(group, parent, next(self._seq_ids))

    def _report(self, decision: SchedulerOutput, times: list[float]) -> None:
        """Tell the listeners about a step; `times` are before and after each of its parts."""
        self._num_steps += 1
        scheduler, memory = self.scheduler, self.scheduler.memory
        stats = StepStats(
            step=self._num_steps,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_swapped=len(scheduler.swapped),
            num_sequences=len(decision.sequences),
            num_tokens=sum(scheduled.num_new_tokens for scheduled in decision.sequences),
            num_preempted=len(decision.preempted),
            num_queried_tokens=decision.num_queried_tokens,
            num_cached_tokens=decision.num_cached_tokens,
            num_blocks_in_use=memory.num_blocks - memory.num_free,
            num_blocks=memory.num_blocks,
            schedule_seconds=times[1] - times[0],
            run_seconds=times[2] - times[1],
            sample_seconds=times[3] - times[2],
        )
        for listener in self.listeners:
            listener(decision, stats)

    # ---- requests come and go ------------------------------------------------------------------

    def add_request(self, request_id: str, prompt: Prompt, params: Params | None = None) -> None:
        """Queue a prompt (text or token ids) for sampling or, with BeamSearchParams, beam search.

        Raises:
            InvalidRequest, PromptTooLong: it could never be served; all others go on.
            InvalidOption: its parameters do not suit the model, as a token that it lacks.
            MissingTokenizer: prompt or stop strings are text, and the model has no tokenizer.
        """
        params = SamplingParams() if params is None else params
        read = read_prompt(prompt, self.tokenizer)
        self._refuse_what_cannot_be_served(request_id, read, params)
        if isinstance(params, SamplingParams):
            width, wants_prompt = params.num_samples, params.prompt_logprobs is not None
        else:
            width, wants_prompt = params.beam_width, False
        seq = Sequence(
            next(self._seq_ids),
            read.token_ids,
            max_output_len=params.max_tokens,
            cache_salt=read.cache_salt,
            reads_cache=not wants_prompt,  # for the logits of the prompt, all of it is computed
        )
        group = SequenceGroup(request_id, [seq], width=width)
        self.scheduler.add(group)
        arrival = Arrival(group, read, self._traits, self._clock())
        seed = self._seeds.getrandbits(63)  # drawn in any case: one request shifts no other's seed
        if isinstance(params, BeamSearchParams):
            self._requests[request_id] = BeamRequest(arrival, params)
        else:
            seed = seed if params.seed is None else params.seed
            self._requests[request_id] = self._sampling_request(arrival, params, seed)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request at once and return what it has; None if there is no such request."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        self.scheduler.abort(request.group)
        request.finish_all("abort")
        return request.output()

    @property
    def unfinished_request_ids(self) -> set[str]:
        return set(self._requests)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    # ---- prefixes that stay (section 4.4, shared prefix) ---------------------------------------

    def pin_prefix(self, prompt: Prompt) -> CachedPrefix | None:
        """Keep the blocks of a computed prefix; None if it is not, or no longer, in the cache."""
        read = read_prompt(prompt, self.tokenizer)
        seq = Sequence(next(self._seq_ids), read.token_ids, cache_salt=read.cache_salt)
        memory = self.scheduler.memory
        if memory.pin(seq) < seq.num_tokens:
            memory.free(seq)
            return None
        prefix = CachedPrefix(seq.num_tokens, len(memory.tables[seq.seq_id]))
        self._prefixes[prefix] = seq
        return prefix

    def release_prefix(self, prefix: CachedPrefix) -> None:
        """Let go of a pinned prefix: it stays until its blocks are needed, like any other."""
        if not isinstance(prefix, CachedPrefix):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequest(
                f"{prefix!r} is no cached prefix: give what cache_prefix returned."
            )
        seq = self._prefixes.pop(prefix, None)
        if seq is None:
            raise InvalidRequest(f"{prefix} is not pinned here: was it released before?")
        self.scheduler.memory.free(seq)

    def _refuse_what_cannot_be_served(
        self, request_id: str, prompt: TokenizedPrompt, params: Params
    ) -> None:
        vocab_size = self.runner.model.config.vocab_size
        if request_id in self._requests:
            raise InvalidRequest(f"request {request_id!r} is being served: choose another id.")
        outside = [t for t in prompt.token_ids if not 0 <= t < vocab_size]
        if outside:
            raise InvalidRequest(
                f"the prompt holds token id {outside[0]}, and the model knows ids from 0 to "
                f"{vocab_size - 1}: was it encoded for another model?"
            )
        if isinstance(params, SamplingParams):
            params.check_vocab(vocab_size)
            if params.stop_strings and self.tokenizer is None:
                raise MissingTokenizer(
                    "stop strings need text, but the model's folder holds no tokenizer: "
                    "use stop_token_ids."
                )
        elif isinstance(params, BeamSearchParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            params.check_vocab(vocab_size, len(self._traits.eos_token_ids))
        else:
            raise InvalidRequest(
                f"{params!r} is no SamplingParams: give SamplingParams(...) or "
                "BeamSearchParams(...)."
            )
