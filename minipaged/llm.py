"""`LLM`, the main interface: prompts in, RequestOutputs out."""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import count
from threading import Lock
from typing import Any

from minipaged.engine.arg_utils import LLMArgs
from minipaged.engine.beam_output import BeamSearchOutput
from minipaged.engine.build import build_engine
from minipaged.engine.outputs import CachedPrefix, Progress, RequestOutput
from minipaged.engine.vllm_names import LLMNames, prompts_of
from minipaged.errors import InvalidRequest
from minipaged.sampling import BeamSearchParams, Params, SamplingParams, one_for_each
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.chat_prompt import chat_prompt
from minipaged.tokenizer.chat_template import Message, list_chats
from minipaged.tokenizer.prompts import Prompt, list_prompts, read_prompt
from minipaged.utils.options import require_type, shown, takes
from minipaged.utils.progress import ShowBar, progress_bar

logger = logging.getLogger(__name__)


class LLM(LLMNames):
    """A model with a paged KV cache that generates for many prompts at once.

        >>> llm = LLM("storyteller")
        >>> [output] = llm.generate("Theo the frog", SamplingParams(temperature=0, max_tokens=8))

    Its arguments are those of `LLMArgs`, and those of vLLM's LLM, which are translated or refused
    (see `minipaged/utils/vllm_options.py`). They cannot be changed later.

    The processes of other ranks end with this one, or when the LLM is deleted (`del llm`).
    """

    @takes(LLMArgs)
    def __init__(self, args: LLMArgs) -> None:
        """Load the model and set up memory and scheduler.

        Raises:
            InvalidOption: an option cannot work or would be ignored, or the weights do not fit in
                memory.
            CheckpointError: the model is not on this machine, or cannot be loaded.
            WorkerLost: one of several ranks could not start. All have been ended.
        """
        self.args, self.folders = args, args.find_folders()
        self.folder = self.folders.model
        self.engine = build_engine(args, self.folders)
        self._numbers = count()
        # Ids of the open requests of `generate` and `stream`, and the progress of each that its
        # stream has not read yet: several streams share every step.
        self._open: set[str] = set()
        self._unread: dict[str, list[Progress]] = {}
        self._abandoned: set[str] = set()  # open requests of closed streams, to be aborted
        self._num_steps_read = 0  # the steps whose progress is in `_unread`
        self._lock = Lock()  # threads take turns: each step serves the requests of all of them

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = Lock()  # a lock cannot be copied to another process

    def get_tokenizer(self) -> Tokenizer | None:
        """Return the model's tokenizer, or None if its folder has none."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt] | None = None,
        sampling_params: Params | Iterable[Params] | None = None,
        use_tqdm: ShowBar = True,
        prompt_token_ids: Iterable[int] | Iterable[Iterable[int]] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Generate for all prompts together, and return the outputs in the given order.

        Args:
            prompts: text, token ids, {"prompt": ...} or {"prompt_token_ids": ...}; one or many.
            sampling_params: one for all, or one per prompt; None: `get_default_sampling_params()`.
                Greedy decoding, sampling and beam search (BeamSearchParams) may be mixed.
            use_tqdm: show a progress bar with tokens per second, unless TQDM_DISABLE is set in
                the environment. It may be a callable that makes the bar, such as tqdm itself.
            prompt_token_ids: token ids instead of prompts, or instead of the texts in prompts.
            others: further arguments of vLLM's generate, accepted only with neutral values.

        Raises:
            InvalidRequest, InvalidOption, MissingTokenizer: a prompt can never be served.
            RequestFailed: the code of a request failed. See `LLMEngine.step`.
            WorkerLost: one of several ranks has ended or does not respond. This LLM cannot be used
                any more.

        After an error or Ctrl-C, all prompts of this call are aborted; other calls continue.
        Several threads may call at once: every step serves the requests of all of them.
        """
        require_type("use_tqdm", use_tqdm, bool | Callable)
        many = prompts_of(prompts, prompt_token_ids, others)
        outputs: dict[int, RequestOutput] = {}
        num_tokens = 0
        with (
            progress_bar(total=len(many), desc="prompts", shown=use_tqdm) as bar,
            closing(self._serve(many, sampling_params)) as served,
        ):
            for index, progress in served:
                if progress.finished:
                    outputs[index] = output = progress.build_output()
                    num_tokens += sum(len(o.token_ids) for o in output.outputs)
                    speed = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                    bar.update()
        return [outputs[index] for index in range(len(many))]

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: Params | Iterable[Params] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Like `generate`, but yields (index of the prompt, output so far) after each token.

        Beam search and best_of yield only final outputs, because their best sequence may change.
        With an `output_kind` of DELTA, an output contains only new tokens.

        Several streams may be open at once, in one thread or in several; they share every step. A
        stream that is closed early, or stopped by an error, aborts its unfinished requests. No
        prompt is checked or computed before the first output is requested.

        Raises RequestFailed if the code of a request fails (see `LLMEngine.step`), and what
        `generate` raises.
        """
        with closing(self._serve(list_prompts(prompts), sampling_params)) as served:
            for index, progress in served:
                yield index, progress.output()

    def _serve(
        self, prompts: list[Prompt], sampling_params: Params | Iterable[Params] | None
    ) -> Generator[tuple[int, Progress]]:
        """Add the prompts, then step until all have finished; aborts the others when closed."""
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = one_for_each(sampling_params, len(prompts))
        mine: dict[str, int] = {}  # request id -> index of the prompt
        try:
            with self._lock:
                self._refuse_to_run_for_others()
                for index, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
                    mine[request_id := f"llm-{next(self._numbers)}"] = index
                    self._open.add(request_id)
                    self.engine.add_request(request_id, prompt, chosen)
            while mine:
                with self._lock:
                    if self._unread.keys().isdisjoint(mine):
                        self._step()
                    ready = [request_id for request_id in self._unread if request_id in mine]
                for request_id in ready:
                    steps, index = self._unread.pop(request_id), mine[request_id]
                    progress = steps[0] if len(steps) == 1 else Progress.joined(steps)
                    if progress.error is not None:
                        raise progress.error
                    if progress.finished:
                        del mine[request_id]
                        self._open.remove(request_id)
                    yield index, progress
        finally:
            self._abandoned.update(mine)
            # The lock is taken if another thread runs a step, which then aborts them, or if the
            # garbage collector closes a stream in the middle of one.
            while self._abandoned and self._lock.acquire(blocking=False):
                try:
                    self._abort_abandoned()
                finally:
                    self._lock.release()

    def _step(self) -> None:
        """Run one step for all open streams, unless Ctrl-C has left the last one unread."""
        self._abort_abandoned()
        if self._num_steps_read == self.engine.last_step[0]:
            self.engine.step()
        num_steps, progresses = self.engine.last_step
        for progress in progresses:
            if progress.request_id in self._open:
                self._unread.setdefault(progress.request_id, []).append(progress)
        self._num_steps_read = num_steps

    def _abort_abandoned(self) -> None:
        for request_id in list(self._abandoned):
            try:
                self.engine.abort_request(request_id)
            except Exception:  # the request is aborted nevertheless
                logger.exception("a part failed while request %r was aborted", request_id)
            self._open.discard(request_id)
            self._unread.pop(request_id, None)
            self._abandoned.remove(request_id)

    def beam_search(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: BeamSearchParams,
        use_tqdm: ShowBar = True,
        **others: Any,
    ) -> list[BeamSearchOutput]:
        """Search for the likeliest sequences after each prompt, and return them best first.

        Each result has `outputs` without the prompt, as for any request, and `sequences` with the
        prompt, as in vLLM.

        Raises InvalidRequest if params are not BeamSearchParams, and what `generate` raises.
        """
        if not isinstance(params, BeamSearchParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequest(
                f"beam_search takes one BeamSearchParams for all prompts, not {shown(params)}: for "
                "sampling, or one for each prompt, use generate."
            )
        outputs = self.generate(prompts, params, use_tqdm, **others)
        return [BeamSearchOutput.of(output, self.get_tokenizer()) for output in outputs]

    def cache_prefix(self, prefix: Prompt) -> CachedPrefix:
        """Compute a prefix that many prompts share, and keep it until it is released.

        This is the paper's shared prefix (section 4.4, Figure 10). Only full blocks are kept: the
        tokens after the last of them are computed with every prompt. A prompt shares the prefix if
        its first tokens are the same. Open streams continue, and the prefix is scheduled like any
        request.

        Raises:
            InvalidRequest: prefix caching is off, or the prefix does not fill a block.
            PromptTooLong: the prefix does not fit.
        """
        config = self.engine.config
        read = read_prompt(prefix, self.engine.tokenizer, config.max_model_len)
        num_tokens = len(read.token_ids) // config.block_size * config.block_size
        if not config.enable_prefix_caching:
            raise InvalidRequest(
                "a prefix can be cached only in paged memory with prefix caching: leave out "
                "enable_prefix_caching and memory."
            )
        if num_tokens == 0:
            raise InvalidRequest(
                f"a prefix of {len(read.token_ids)} fills no block of {config.block_size} tokens, "
                "and only full blocks are shared: give a longer one, or lower block_size."
            )
        whole: Prompt = {"prompt_token_ids": read.token_ids[:num_tokens]}
        if read.cache_salt is not None:
            whole["cache_salt"] = read.cache_salt
        pinned = None
        while pinned is None:  # once, unless another thread needs its blocks in between
            self.generate(whole, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
            with self._lock:
                pinned = self.engine.pin_prefix(whole)
        return pinned

    def release_prefix(self, prefix: CachedPrefix) -> None:
        """Release a prefix, whose blocks may then be evicted. Raises InvalidRequest if repeated."""
        with self._lock:
            self.engine.release_prefix(prefix)

    def _refuse_to_run_for_others(self) -> None:
        self._abort_abandoned()
        if not self.engine.unfinished_request_ids <= self._open:
            raise InvalidRequest(
                "llm.engine is serving requests that were added to it directly, whose outputs "
                "would be lost here: finish them with llm.engine.step() first."
            )

    def chat(
        self,
        messages: Message | Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params | Iterable[Params] | None = None,
        use_tqdm: ShowBar = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Generate the next assistant turn of one conversation, or of many.

        A single message is a conversation of one turn. The checkpoint's chat template turns the
        messages into a prompt. `options` are those of
        `minipaged.tokenizer.chat_template.read_chat`; further options of vLLM's chat are accepted
        only with neutral values. A special token in a message, such as "<|im_end|>", is encoded as
        ordinary text: only the template writes control tokens. Raises CheckpointError if there is
        no template, and what `generate` raises.
        """
        tokenizer, longest = self.get_tokenizer(), self.engine.config.max_model_len
        options = self._chat_options(options)
        prompts = [
            chat_prompt(self.folders.tokenizer, tokenizer, chat, longest, **options)
            for chat in list_chats(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm)
