"""The engine: every `step()` computes one more token, or a chunk of prompt, of all who run."""

import random
import time
from collections.abc import Callable
from itertools import count

from torch import Tensor

from minipaged.batch import BatchBuilder, Query
from minipaged.config import EngineConfig
from minipaged.errors import InvalidRequest, MissingTokenizer
from minipaged.outputs import RequestOutput
from minipaged.prompts import Prompt, read_prompt
from minipaged.request import Completion, Request
from minipaged.runner import ModelRunner
from minipaged.sampling import SampledToken, Sampler, SamplingParams, SamplingRow
from minipaged.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.tokenizer import Tokenizer


class LLMEngine:
    """Requests go in at any time; each step returns what it has added to them.

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
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.batches = batches
        self.runner = runner
        self.tokenizer = tokenizer
        self.sampler = Sampler()
        self._requests: dict[str, Request] = {}
        self._seq_ids = count()
        self._seeds = random.Random(seed)  # for requests that bring no seed of their own
        self._clock = clock

    # ---- one step, in the order a token travels ------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step; returns the requests it changed, finished ones for the last time."""
        plan = self.scheduler.schedule()  # who runs, how many tokens of each
        batch = self.batches.build([self._query(s) for s in plan.sequences])  # to tensors
        logits = self.runner.run(plan, batch)  # [rows, vocab]: the device side
        sampled = self._sample(plan, logits)  # by sequence id
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

    def _sample(self, plan: ScheduledBatch, logits: Tensor) -> dict[int, SampledToken]:
        """Choose the next token of every sequence of which nothing is left to compute."""
        rows: list[SamplingRow] = []
        row_indices: list[int] = []
        seq_ids: list[int] = []
        start = 0
        for scheduled in plan.sequences:
            request, seq = self._requests[scheduled.group.request_id], scheduled.seq
            stop = start + self._num_logits(scheduled)
            if request.wants_prompt_logits(seq):
                request.note_prompt_logits(seq, logits[start:stop])
            if scheduled.samples:
                rows.append(request.sampling_row(seq))
                row_indices.append(stop - 1)
                seq_ids.append(seq.seq_id)
            start = stop
        if len(rows) < logits.shape[0]:
            logits = logits[row_indices]  # [sampled rows, vocab]
        return dict(zip(seq_ids, self.sampler.sample(logits, rows), strict=True))

    def _commit(
        self, plan: ScheduledBatch, sampled: dict[int, SampledToken]
    ) -> list[RequestOutput]:
        """Note what was computed, add the new tokens, and let go of what has ended."""
        changed: dict[str, Request] = {}
        now = self._clock()
        for scheduled in plan.sequences:
            group, seq = scheduled.group, scheduled.seq
            seq.mark_computed(scheduled.num_new_tokens)
            if seq.seq_id in sampled:
                request = changed[group.request_id] = self._requests[group.request_id]
                if request.add(seq, sampled[seq.seq_id], now):
                    self.scheduler.finish(group, seq)
        for group in plan.ended:
            request = changed[group.request_id] = self._requests[group.request_id]
            request.finish_all("length")
        outputs = [request.output() for request in changed.values()]
        for output in outputs:
            if output.finished:
                del self._requests[output.request_id]
        return outputs

    # ---- requests come and go ------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None
    ) -> None:
        """Queue a prompt (text or token ids).

        Raises:
            InvalidRequest, PromptTooLong: it could never be served; all others go on.
            InvalidOption: its parameters name a token that the model lacks.
            MissingTokenizer: prompt or stop strings are text, and the model has no tokenizer.
        """
        params = SamplingParams() if params is None else params
        text, token_ids = read_prompt(prompt, self.tokenizer)
        self._refuse_what_cannot_be_served(request_id, token_ids, params)
        seq = Sequence(next(self._seq_ids), token_ids)
        group = SequenceGroup(request_id, [seq], num_seats=params.num_samples)
        self.scheduler.add(group)
        seed = self._seeds.getrandbits(63)  # drawn in any case: one request shifts no other's seed
        if params.seed is not None:
            seed = params.seed
        self._requests[request_id] = Request(
            group,
            params,
            [Completion(seq, params, self.tokenizer, seed)],
            prompt=text,
            arrival_time=self._clock(),
            eos_token_ids=self.runner.model.config.eos_token_ids,
            max_model_len=self.config.max_model_len,
        )

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

    def _refuse_what_cannot_be_served(
        self, request_id: str, token_ids: list[int], params: SamplingParams
    ) -> None:
        vocab_size = self.runner.model.config.vocab_size
        if not isinstance(params, SamplingParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequest(f"{params!r} is no SamplingParams: give SamplingParams(...).")
        if request_id in self._requests:
            raise InvalidRequest(f"request {request_id!r} is being served: choose another id.")
        outside = [t for t in token_ids if not 0 <= t < vocab_size]
        if outside:
            raise InvalidRequest(
                f"the prompt holds token id {outside[0]}, and the model knows ids from 0 to "
                f"{vocab_size - 1}: was it encoded for another model?"
            )
        params.check_vocab(vocab_size)
        if params.stop_strings and self.tokenizer is None:
            raise MissingTokenizer(
                "stop strings need text, but the model's folder holds no tokenizer: "
                "use stop_token_ids."
            )
        if params.num_samples > 1:
            raise InvalidRequest(
                f"the request asks for {params.num_samples} samples of one prompt, which is not "
                "built yet: ask for n=1, or send the prompt several times."
            )
