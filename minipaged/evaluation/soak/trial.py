"""One random engine with its requests, from the first arrival to the return of all blocks."""

from collections import Counter
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from minipaged.engine.metrics import StepStats
from minipaged.engine.outputs import CachedPrefix, FinishReason, Progress, RequestOutput
from minipaged.engine.parts import Parts
from minipaged.errors import InvalidRequest
from minipaged.evaluation.soak.run import Mismatch
from minipaged.evaluation.soak.workload import RandomRequest, Workload
from minipaged.llm import LLM
from minipaged.scheduler.output import SchedulerOutput
from minipaged.tokenizer.prompts import read_prompt

MOST_STEPS = 5000  # far more than any workload needs: an engine that reaches it hangs


@dataclass(frozen=True)
class Served:
    """A request and its result."""

    request: RandomRequest
    output: RequestOutput
    cut_after: int | None = None  # number of tokens per sequence; None: it was not cut
    cut_reason: FinishReason | None = None  # of the completions that were cut


class Trial:
    """Runs one workload. Raises Mismatch if the engine violates an invariant.

    A request may end early because it is aborted, or because the pool is too small for it. A
    request that can never fit in the pool is refused, and does not count.
    """

    def __init__(self, workload: Workload) -> None:
        self.served: list[Served] = []
        self.num_rejected = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_ran_out = 0
        self._workload = workload
        self._open: dict[str, RandomRequest] = {}
        self._came: dict[str, int] = {}  # the step before which a request arrived
        self._num_samples = Counter[str]()  # number of steps that have sampled for a request
        self._ran_out: set[str] = set()  # requests that have outgrown the pool
        self._streamed: dict[tuple[str, int], tuple[list[int], str]] = {}
        self._pinned: list[CachedPrefix] = []

    def run(self, folder: Path, parts: Parts) -> None:
        """Serve all requests with the model in a folder; `served` has the results."""
        self._engine = LLM(folder, device="cpu", parts=parts, **self._workload.options).engine
        self._engine.listeners.append(self._watch)
        coming = list(enumerate(self._workload.requests))
        step = 0
        while coming or self._open:
            if step == MOST_STEPS:
                raise Mismatch(f"{len(self._open)} requests are not served in {MOST_STEPS} steps")
            while coming and coming[0][1].arrives <= step:
                number, request = coming.pop(0)
                self._add(str(number), request, step)
            self._abort_what_is_due(step)
            if self._open:
                for progress in self._engine.step():
                    self._take(progress)
            step += 1
        self._check_that_all_blocks_are_back()

    def _add(self, request_id: str, request: RandomRequest, step: int) -> None:
        try:
            self._engine.add_request(request_id, request.prompt, request.params)
        except InvalidRequest as error:
            engine = self._engine
            longest = engine.config.max_model_len
            read = read_prompt(request.prompt, engine.tokenizer, longest)
            length = len(read.token_ids)
            self._check_lack_of_blocks(length, 1, str(error))
            self.num_rejected += 1
        else:
            self._open[request_id], self._came[request_id] = request, step

    def _abort_what_is_due(self, step: int) -> None:
        for request_id, request in list(self._open.items()):
            if request.aborted is not None and step >= self._came[request_id] + request.aborted:
                output = self._engine.abort_request(request_id)
                if output is None:
                    raise Mismatch(f"request {request_id} is open but cannot be aborted")
                self._close(request_id, output, "abort")

    def _watch(self, decision: SchedulerOutput, stats: StepStats) -> None:
        self.num_preemptions += stats.num_preempted
        self.num_cached_tokens += stats.num_cached_tokens
        self._num_samples.update({s.group.request_id for s in decision.sequences if s.samples})
        self._ran_out.update(group.request_id for group in decision.ended)

    def _take(self, progress: Progress) -> None:
        for new in progress.new:
            place = progress.request_id, new.completion
            tokens, text = self._streamed.get(place, ([], ""))
            self._streamed[place] = tokens + new.token_ids, text + new.text
        if not progress.finished:
            return
        request_id, output = progress.request_id, progress.build_output()
        if progress.error is not None:
            raise progress.error
        for completion in output.outputs:
            streamed = self._streamed.get((request_id, completion.index), ([], ""))
            if streamed != (completion.token_ids, completion.text):
                raise Mismatch(f"request {request_id} streamed {streamed}, but ends as {output}")
        ran_out = request_id in self._ran_out
        if ran_out:
            length = len(output.prompt_token_ids) + self._num_samples[request_id] + 1
            width = self._open[request_id].width
            self._check_lack_of_blocks(length, width, f"request {request_id} ran out of memory")
            self.num_ran_out += 1
        request = self._close(request_id, output, "length" if ran_out else None)
        if request.pins and (prefix := self._engine.pin_prefix(request.prompt)) is not None:
            self._pinned.append(prefix)

    def _close(
        self, request_id: str, output: RequestOutput, cut_reason: FinishReason | None
    ) -> RandomRequest:
        request = self._open.pop(request_id)
        cut_after = None if cut_reason is None else self._num_samples[request_id]
        self.served.append(Served(request, output, cut_after, cut_reason))
        return request

    def _check_lack_of_blocks(self, length: int, width: int, what: str) -> None:
        """A request may be refused or ended only if its sequences do not fit, even unshared."""
        options = self._workload.options
        needed = width * ceil(length / options["block_size"])
        available = options["num_blocks"] - sum(prefix.num_blocks for prefix in self._pinned)
        if options["memory"] == "paged" and needed <= available:
            raise Mismatch(f"{what}, but it needs {needed} blocks and {available} are available")

    def _check_that_all_blocks_are_back(self) -> None:
        for prefix in self._pinned:
            self._engine.release_prefix(prefix)
        memory = self._engine.memory
        lost = memory.num_blocks - memory.num_free
        lost_to_swap = memory.num_swap_blocks - memory.num_free_swap_blocks
        if lost or lost_to_swap or memory.tables:
            raise Mismatch(f"{lost} blocks and {lost_to_swap} swap blocks did not come back")
