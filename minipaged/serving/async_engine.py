"""The engine of a server: one thread owns it, and the event loop sends it messages.

    event loop     serve() --> inbox --.         _deliver() --> Stream --> response
                                       v            ^
    engine thread                 add, abort --> step --> results

Only the engine thread calls the engine. Between two steps it executes the calls in the inbox. After
a step it stores the results for the event loop. It wakes the loop only for urgent results: first
tokens, ends and errors. The loop fetches all others every `interval` seconds. Results that a slow
reader has not read yet wait in its stream, where they delay no other request; there can be no more
of them than the reader's own output.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import TypeVar

from minipaged.engine.arrivals import CheckedRequest
from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.metrics import StepStats
from minipaged.engine.outputs import Progress
from minipaged.errors import EngineDead, ServerClosing
from minipaged.scheduler.output import SchedulerOutput
from minipaged.serving.streams import Queue, Result, Stage, Stream

logger = logging.getLogger(__name__)

T = TypeVar("T")
Observer = Callable[[Sequence[Progress]], None]

SECONDS_TO_STOP = 5.0  # for the running step; a part that hangs must not keep the process alive
SECONDS_TO_CHECK = 1.0  # between two checks that the ranks of an idle engine still run
TEXT_THREADS = 2  # for templates and tokenizers: a single huge prompt leaves one of them free


class AsyncEngine:
    """An engine in its own thread, for one event loop.

    If a step raises, the engine is dead: all open and all later requests fail with EngineDead, and
    `died` is set.

    Args:
        engine: no other thread may call it from now on.
        max_queued: maximum requests that wait to be scheduled, counting each sample.
        max_queued_tokens: maximum tokens of their prompts together; None: any number.
        interval: seconds between deliveries of tokens that are not urgent; 0: after every step.
        observers: called in the engine thread with the progress of each step, and of each abort.
    """

    def __init__(
        self,
        engine: LLMEngine,
        *,
        max_queued: int,
        max_queued_tokens: int | None = None,
        interval: float = 0.0,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.engine = engine
        self.queue = Queue(max_queued, max_queued_tokens)
        self.error: BaseException | None = None
        self.died = asyncio.Event()
        self._interval = interval
        self._observers = observers
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._texts = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="texts")
        self._streams: dict[str, tuple[Stream, int]] = {}  # used by the loop only
        self._look: asyncio.TimerHandle | None = None  # the next delivery; used by the loop only
        self._unscheduled: set[str] = set()  # this and the next: used by the engine thread only
        self._without_tokens: set[str] = set()
        self._numbers = count()
        self._is_closing = False
        self._is_stopped = False
        self._lock = threading.Lock()  # for the next two
        self._results: list[tuple[str, Result]] = []
        self._is_waking = False
        self._loop = asyncio.get_running_loop()
        engine.listeners.append(self._note_scheduled)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- in the event loop -----------------------------------------------------------------------

    async def serve(
        self, check: Callable[[], Sequence[CheckedRequest]], num_sequences: int
    ) -> Stream:
        """Serve the requests of one caller, who must always `close` the stream.

        Args:
            check: reads and checks the requests. It is called in a thread for texts, because
                encoding a long prompt takes long.
            num_sequences: the number of samples of all requests together.

        Raises ServerClosing, EngineDead, QueueFull, and what `check` raises.
        """
        self.refuse_if_closed()
        self.queue.enter(num_sequences)
        try:
            requests = await self.in_a_text_thread(check)
            self.refuse_if_closed()
            self.queue.add_tokens(sum(len(each.prompt.token_ids) for each in requests))
        except BaseException:
            self.queue.leave(num_sequences, 0)
            raise
        by_id = {str(next(self._numbers)): request for request in requests}
        stream = Stream(by_id, self.queue, self.abort)
        for index, (request_id, request) in enumerate(by_id.items()):
            self._streams[request_id] = stream, index
            self._inbox.put(partial(self._add, request_id, request))
        return stream

    def refuse_if_closed(self) -> None:
        """Raises EngineDead or ServerClosing."""
        if self.error is not None:
            raise EngineDead(_death(self.error)) from self.error
        if self._is_closing:
            raise ServerClosing("the server is shutting down: send the request to another one.")

    async def in_a_text_thread(self, function: Callable[[], T]) -> T:
        """Run a function that would block the event loop in a thread, and return its result.

        Raises EngineDead or ServerClosing if the engine has stopped when its turn comes.
        """

        def in_its_turn() -> T:
            self.refuse_if_closed()
            return function()

        self.refuse_if_closed()
        return await self._loop.run_in_executor(self._texts, in_its_turn)

    async def between_steps(self, function: Callable[[], T]) -> T:
        """Run a function in the engine thread between two steps, and return its result.

        Raises ServerClosing, EngineDead, and what the function raises.
        """
        self.refuse_if_closed()
        future: Future[T] = Future()
        self._inbox.put(partial(_fulfil, future, function))
        answer = asyncio.wrap_future(future)
        while not (await asyncio.wait([answer], timeout=1.0))[0]:
            self.refuse_if_closed()  # the engine may have stopped before it read this message
        return answer.result()

    def abort(self, request_id: str) -> None:
        """End a request whose reader has left, unless it has ended."""
        if self._streams.pop(request_id, None) is not None:
            self._inbox.put(partial(self._abort, request_id))

    @property
    def has_ended(self) -> bool:
        """Whether there will be no more steps."""
        return self._is_stopped or self.error is not None

    async def close(self, grace: float) -> None:
        """Accept no more requests, give open ones `grace` seconds, abort the rest, and stop."""
        self._is_closing = True
        deadline = self._loop.time() + grace
        while self._streams and self.error is None and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        self._fail_all(ServerClosing, "the server is shutting down, so the request was aborted.")
        self._inbox.put(self._stop)
        await self._loop.run_in_executor(None, self._thread.join, SECONDS_TO_STOP)
        self._texts.shutdown(wait=False)  # functions that still wait there are refused later

    def _deliver(self) -> None:
        """Deliver all results to their streams."""
        with self._lock:
            results, self._results = self._results, []
            self._is_waking = False
        for request_id, result in results:
            stream, index = self._streams.get(request_id, (None, 0))
            if stream is None:
                continue  # aborted meanwhile
            if isinstance(result, Exception) or (isinstance(result, Progress) and result.finished):
                del self._streams[request_id]
            stream.put(index, result)
        if self._streams and self._look is None and self._interval:
            self._look = self._loop.call_later(self._interval, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        self._deliver()

    def _fail_all(self, kind: type[EngineDead | ServerClosing], message: str) -> None:
        """End all streams with an error, which also aborts their requests."""
        for stream, _ in list(self._streams.values()):
            stream.fail(kind(message))

    def _tell_of_death(self, message: str) -> None:
        self._fail_all(EngineDead, message)
        self.died.set()

    # ---- in the engine thread --------------------------------------------------------------------

    def _run(self) -> None:
        """Step while there are requests; wait for messages when there are none."""
        try:
            while not self._is_stopped:
                is_idle = not self.engine.has_unfinished_requests()
                while is_idle or not self._inbox.empty():
                    self._next_message()()
                    is_idle = False
                if self.engine.has_unfinished_requests():
                    progresses = self.engine.step()
                    self._observe(progresses)
                    urgent = [each for each in progresses if self._is_urgent(each)]
                    results = [(each.request_id, each.error or each) for each in progresses]
                    self._leave(results, at_once=bool(urgent) or not self._interval)
                    if urgent:  # the event loop is awake and needs the interpreter's lock
                        time.sleep(0)
        except BaseException as error:
            logger.critical("the engine is dead", exc_info=error)
            self.error = error
            self._loop.call_soon_threadsafe(self._tell_of_death, _death(error))

    def _observe(self, progresses: Sequence[Progress]) -> None:
        for observer in self._observers:
            observer(progresses)

    def _next_message(self) -> Callable[[], None]:
        """Wait for the next message. Raises WorkerLost if a rank is lost meanwhile."""
        while True:
            try:
                return self._inbox.get(timeout=SECONDS_TO_CHECK)
            except Empty:
                self.engine.executor.check()

    def _add(self, request_id: str, request: CheckedRequest) -> None:
        try:
            self.engine.add_request(request_id, request)
        except Exception as error:  # concerns only this request: `add_request` is atomic
            self._leave([(request_id, error)])
        else:
            self._unscheduled.add(request_id)
            self._without_tokens.add(request_id)
            self._leave([(request_id, Stage.ACCEPTED)])

    def _note_scheduled(self, decision: SchedulerOutput, _: StepStats) -> None:
        if self._unscheduled:
            first = self._unscheduled & {group.request_id for group, *_ in decision.sequences}
            self._unscheduled -= first
            self._leave([(request_id, Stage.SCHEDULED) for request_id in first])

    def _abort(self, request_id: str) -> None:
        self._unscheduled.discard(request_id)
        self._without_tokens.discard(request_id)
        try:
            output = self.engine.abort_request(request_id)
        except Exception:  # the request is aborted nevertheless, and the others continue
            logger.exception("a part failed while a request was aborted")
            output = None
        if output is not None:
            self._observe([Progress(request_id, [], True, lambda: output)])

    def _is_urgent(self, progress: Progress) -> bool:
        """Whether it is a request's first token or its last."""
        is_first = progress.request_id in self._without_tokens
        self._without_tokens.discard(progress.request_id)
        return is_first or progress.finished

    def _stop(self) -> None:
        self._is_stopped = True

    def _leave(self, results: Sequence[tuple[str, Result]], at_once: bool = True) -> None:
        """Store results for the event loop; wake it, or leave them for its next delivery."""
        with self._lock:
            self._results += results
            wakes = at_once and not self._is_waking
            self._is_waking = self._is_waking or wakes
        if wakes:
            self._loop.call_soon_threadsafe(self._deliver)


def _fulfil(future: "Future[T]", function: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)


def _death(error: BaseException) -> str:
    return (
        f"the engine has failed ({type(error).__name__}: {error}) and serves no more requests: "
        "restart the server."
    )
