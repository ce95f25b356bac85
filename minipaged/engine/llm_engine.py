"""The engine: every `step()` computes a token more, or a chunk of prompt, of those who run."""

import random
import time
from collections.abc import Callable
from functools import partial
from itertools import count

import torch
from torch import Tensor

from minipaged.attention.batch import BatchBuilder, Query
from minipaged.config import EngineConfig
from minipaged.engine.beam_request import BeamRequest
from minipaged.engine.outputs import CachedPrefix, RequestOutput
from minipaged.engine.request import Arrival, ModelTraits, Request, SamplingRequest
from minipaged.errors import InvalidRequest, MissingTokenizer
from minipaged.sampling import (
    BeamSearchParams,
    Params,
    SampledToken,
    Sampler,
    SamplingParams,
    SamplingRow,
)
from minipaged.scheduler.fcfs import Scheduler
from minipaged.scheduler.output import ScheduledSequence, SchedulerOutput
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.prompts import Prompt, TokenizedPrompt, read_prompt
from minipaged.utils.device import to_device
from minipaged.worker.model_runner import ModelRunner

Sampled = dict[str, dict[int, list[SampledToken]]]  # by request id, by sequence id


class LLMEngine:
    """Requests go in at any time; each step returns those of which there is more to show.

    The engine owns the requests and their texts. Queues belong to the scheduler, blocks to the
    memory below it, tensors to batches and runner.
    """

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        batches: BatchBuilder,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        *,
        sampling_request: Callable[[Arrival, SamplingParams, int], Request] = SamplingRequest,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.batches = batches
        self.runner = runner
        self.tokenizer = tokenizer
        self.sampler = Sampler()
        self._sampling_request = sampling_request
        eos_token_ids = runner.model.config.eos_token_ids
        self._traits = ModelTraits(tokenizer, eos_token_ids, config.max_model_len)
        self._requests: dict[str, Request] = {}
        self._prefixes: dict[CachedPrefix, Sequence] = {}  # the pinned ones
        self._seq_ids = count()
        self._seeds = random.Random(seed)  # for requests that bring no seed of their own
        self._clock = clock

    # ---- one step, in the order a token travels ------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step; returns the requests with something new, finished ones a last time.

        An output holds all that its request has so far.
        """
        plan = self.scheduler.schedule()  # who runs, how many tokens of each
        batch = self.batches.build([self._query(s) for s in plan.sequences])  # to tensors
        logits = self.runner.run(plan, batch)  # [rows, vocab]: the device side
        sampled = self._sample(plan, logits)  # by request, by sequence
        return self._commit(plan, sampled)

    def _query(self, scheduled: ScheduledSequence) -> Query:
        seq = scheduled.seq
        start = seq.num_computed_tokens
        return Query(
            seq_id=seq.seq_id,
            token_ids=seq.token_ids[start : start + scheduled.num_new_tokens],
            context_len=start,
            table=self.scheduler.memory.block_table(seq.seq_id),
            num_logits=self._num_logits(scheduled),
        )

    def _num_logits(self, scheduled: ScheduledSequence) -> int:
        """For how many of its last tokens a sequence's logits are read."""
        if self._requests[scheduled.group.request_id].wants_prompt_logits(scheduled.seq):
            return scheduled.num_new_tokens
        return 1 if scheduled.samples else 0

    def _sample(self, plan: SchedulerOutput, logits: Tensor) -> Sampled:
        """Choose the next token of every sequence of which nothing is left to compute.

        Several tokens for a prompt with several samples: they are drawn from the same logits.
        """
        rows: list[SamplingRow] = []
        row_indices: list[int] = []
        owners: list[tuple[str, int]] = []
        start = 0
        for scheduled in plan.sequences:
            request, seq = self._requests[scheduled.group.request_id], scheduled.seq
            stop = start + self._num_logits(scheduled)
            if request.wants_prompt_logits(seq):
                request.note_prompt_logits(seq, logits[start:stop])
            for row in request.rows(seq) if scheduled.samples else ():
                rows.append(row)
                row_indices.append(stop - 1)
                owners.append((request.group.request_id, seq.seq_id))
            start = stop
        if row_indices != list(range(logits.shape[0])):
            wanted = to_device(row_indices, logits.device, torch.long)
            logits = logits[wanted]  # [sampled rows, vocab]
        sampled: Sampled = {}
        for (request_id, seq_id), token in zip(
            owners, self.sampler.sample(logits, rows), strict=True
        ):
            sampled.setdefault(request_id, {}).setdefault(seq_id, []).append(token)
        return sampled

    def _commit(self, plan: SchedulerOutput, sampled: Sampled) -> list[RequestOutput]:
        """Note what was computed, fork and go on as each request decides, free what has ended."""
        self.scheduler.commit(plan)
        self._note_sharing(plan)
        now = self._clock()
        changed: list[Request] = []
        for request_id, tokens in sampled.items():
            request = self._requests[request_id]
            request.note_time(now)
            for seq in request.advance(tokens, partial(self._fork, request.group)):
                self.scheduler.finish(request.group, seq)
            changed.append(request)
        for group in plan.ended:
            request = self._requests[group.request_id]
            request.finish_all("length")
            changed.append(request)
        outputs = [request.output() for request in changed if request.can_be_shown]
        for output in outputs:
            if output.finished:
                del self._requests[output.request_id]
        lost = not self.scheduler.has_unfinished() and bool(self._requests)
        assert not lost, f"the scheduler has lost {', '.join(self._requests)}: they would never end"
        return outputs

    def _fork(self, group: SequenceGroup, parent: Sequence) -> Sequence:
        return self.scheduler.fork(group, parent, next(self._seq_ids))

    def _note_sharing(self, plan: SchedulerOutput) -> None:
        """Count the blocks of requests with several sequences (the paper's Figure 15)."""
        memory = self.scheduler.memory
        for group in {s.group for s in plan.sequences if s.group.width > 1}:
            unshared = sum(len(memory.block_table(seq.seq_id)) for seq in group.sequences)
            held = memory.num_distinct_blocks(group)
            self._requests[group.request_id].note_blocks(held, unshared)

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
        prefix = CachedPrefix(seq.num_tokens, len(memory.block_table(seq.seq_id)))
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
