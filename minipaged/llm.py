"""The front door: prompts in, RequestOutputs out."""

from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from minipaged.attention import choose_backend
from minipaged.batch import BatchBuilder
from minipaged.chat import Message, render_chat
from minipaged.config import (
    EngineConfig,
    ModelConfig,
    PreemptionMode,
    require_share,
    require_whole,
)
from minipaged.engine import LLMEngine
from minipaged.errors import CheckpointError, InvalidOption, InvalidRequest, MissingTokenizer
from minipaged.kv_cache import KVCache
from minipaged.models.loader import load_model
from minipaged.outputs import RequestOutput
from minipaged.parts import Parts
from minipaged.prompts import Prompt, list_prompts
from minipaged.runner import (
    SWAP_BYTES,
    ModelRunner,
    blocks_that_fit,
    choose_device,
    refuse_more_than_memory,
)
from minipaged.sampling import SamplingParams, one_for_each
from minipaged.tokenizer import Tokenizer

EMBEDDED = ("storyteller",)  # models that ship inside the package


class LLM:
    """A model behind a paged KV cache, ready to generate for many prompts at once.

        >>> llm = LLM("storyteller")
        >>> [output] = llm.generate("Theo the frog", SamplingParams(temperature=0, max_tokens=8))

    Args:
        model: "storyteller", the model that ships with the library, or a folder with a Hugging
            Face checkpoint (config.json and safetensors).
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:1" ...
        dtype: "auto" (float32 on a CPU, as saved on a GPU), "float32", "bfloat16", "float16".
        attention_backend: "auto", "reference", "blockwise" or "torch".
        block_size: token slots in a block.
        num_blocks: blocks in the pool; None: enough for `max_num_seqs` of the longest sequences,
            if the memory has room for them.
        num_swap_blocks: blocks in the swap pool in host memory; None: as many as in the pool, up to
            2 GiB of them.
        max_model_len: longest prompt and output together; None: what the model can take.
        gpu_memory_utilization: the part of a GPU's memory that weights and cache may fill.
        max_num_seqs: sequences in one step.
        max_num_batched_tokens: tokens in one step; None: 2,048, more where a whole prompt needs it.
        enable_chunked_prefill: whether a long prompt may be computed over several steps.
        preemption: "recompute", "swap", or "auto": what the first vLLM did, swapping groups of
            several sequences and recomputing single ones.
        watermark: the part of the pool that admission leaves free for those who run.
        seed: of all random choices of requests that bring no seed of their own.
        parts: other players for allocator, memory, scheduler, victim, attention.

    Raises:
        InvalidOption: an option cannot work. CheckpointError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path = "storyteller",
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention_backend: str = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        num_swap_blocks: int | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        enable_chunked_prefill: bool = True,
        preemption: PreemptionMode = "auto",
        watermark: float = 0.01,
        seed: int = 0,
        parts: Parts | None = None,
    ) -> None:
        parts = Parts() if parts is None else parts
        where = choose_device(device)
        require_share("gpu_memory_utilization", gpu_memory_utilization, 0.01, 1.0)
        backend = parts.attention(choose_backend(attention_backend))
        self.folder = _find(model)
        loaded = load_model(self.folder, backend, dtype, where)
        kv_dtype = next(loaded.parameters()).dtype
        require_whole("block_size", block_size, 1)
        block_bytes = block_size * loaded.config.kv_bytes_per_token(kv_dtype.itemsize)
        config = _choose_config(
            loaded.config,
            lambda: blocks_that_fit(block_bytes, where, gpu_memory_utilization),
            max(1, SWAP_BYTES // block_bytes),
            num_blocks=num_blocks,
            num_swap_blocks=num_swap_blocks,
            max_model_len=max_model_len,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_chunked_prefill=enable_chunked_prefill,
            preemption=preemption,
            watermark=watermark,
        )
        refuse_more_than_memory(config.num_blocks, config.num_swap_blocks, block_bytes, where)
        self.engine = LLMEngine(
            config,
            parts.build_scheduler(config),
            BatchBuilder(max_num_seqs, config.max_blocks_per_seq, block_size, where),
            ModelRunner(loaded, KVCache.build(loaded.config, config, kv_dtype, where)),
            _open_tokenizer(self.folder),
            seed=seed,
        )
        self._numbers = count()
        # By request id, what a step has brought and its stream has not yet passed on. An output
        # holds all that went before, so only the newest is kept.
        self._news: dict[str, RequestOutput | None] = {}

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if its folder holds none."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate after every prompt, all together, and return the results in the given order.

        Args:
            prompts: text, token ids, {"prompt": ...} or {"prompt_token_ids": ...}; one or many.
            sampling_params: one for all, or one a prompt.
            use_tqdm: show a progress bar with tokens per second.

        Raises:
            InvalidRequest, InvalidOption, MissingTokenizer: a prompt can never be served. None of
                this call's prompts is then left in the engine; other calls go on.
        """
        many = list_prompts(prompts)
        finished: dict[int, RequestOutput] = {}
        num_tokens = 0
        with tqdm(total=len(many), desc="prompts", disable=not use_tqdm) as bar:
            for index, output in self.stream(many, sampling_params):
                if output.finished:
                    finished[index] = output
                    num_tokens += sum(len(o.token_ids) for o in output.outputs)
                    speed = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                    bar.update()
        return [finished[index] for index in range(len(many))]

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Like `generate`, token by token: yields (index of the prompt, what it has so far).

        Several streams may be open at once; they share every step. Whoever stops listening before
        the end, or is stopped by an error, aborts what is left. Nothing is checked and nothing
        computed before the first output is asked for.
        """
        many = list_prompts(prompts)
        params = one_for_each(sampling_params, len(many))
        self._refuse_to_run_for_others()
        mine: dict[str, int] = {}  # request id -> index of the prompt
        try:
            for index, (prompt, chosen) in enumerate(zip(many, params, strict=True)):
                request_id = f"llm-{next(self._numbers)}"
                self.engine.add_request(request_id, prompt, chosen)
                self._news[request_id] = None
                mine[request_id] = index
            while mine:
                if not any(self._news[request_id] for request_id in mine):
                    for output in self.engine.step():
                        if output.request_id in self._news:
                            self._news[output.request_id] = output
                for request_id, index in list(mine.items()):
                    output, self._news[request_id] = self._news[request_id], None
                    if output is not None:
                        if output.finished:
                            del mine[request_id], self._news[request_id]
                        yield index, output
        finally:
            for request_id in mine:
                self.engine.abort_request(request_id)
                self._news.pop(request_id, None)

    def _refuse_to_run_for_others(self) -> None:
        if not self.engine.unfinished_request_ids <= self._news.keys():
            raise InvalidRequest(
                "llm.engine is serving requests that were added to it directly, whose outputs "
                "would be lost here: finish them with llm.engine.step() first."
            )

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate the next assistant turn of one conversation, or of many.

        The messages become a prompt by the checkpoint's own chat template. Raises CheckpointError
        if it has none, and what `generate` raises.
        """
        first = messages[0] if messages else None
        chats = cast(list[list[Message]], messages if isinstance(first, list) else [messages])
        prompts = [render_chat(self.folder, chat) for chat in chats]
        return self.generate(prompts, sampling_params, use_tqdm)


def _find(model: str | Path) -> Path:
    if model in EMBEDDED:
        return Path(str(files("minipaged") / "assets" / str(model)))
    if not model or not Path(model).is_dir():
        raise CheckpointError(
            f"there is no folder {str(model)!r}: give a folder with a checkpoint, or the name of "
            f"an embedded model ({', '.join(EMBEDDED)})."
        )
    return Path(model)


def _open_tokenizer(folder: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_folder(folder)
    except MissingTokenizer:
        return None  # token ids still work; text is refused with a sentence


def _choose_config(
    model: ModelConfig,
    room: Callable[[], int],
    swap_room: int,
    *,
    num_blocks: int | None,
    num_swap_blocks: int | None,
    max_model_len: int | None,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int | None,
    enable_chunked_prefill: bool,
    **others: Any,
) -> EngineConfig:
    """What was asked for, and a number for what was left open, within what memory has room for."""
    require_whole("max_num_seqs", max_num_seqs, 1)
    longest = model.max_position_embeddings
    if max_model_len is None:
        max_model_len = longest
    require_whole("max_model_len", max_model_len, 2)
    if max_model_len > longest:
        raise InvalidOption(
            f"max_model_len is {max_model_len}, but {model.architecture} was made for {longest} "
            f"tokens here: give at most {longest}."
        )
    if num_blocks is None:
        num_blocks = min(max_num_seqs * ceil(max_model_len / block_size), room())
    require_whole("num_blocks", num_blocks, 1)
    if num_swap_blocks is None:
        num_swap_blocks = min(num_blocks, swap_room)
    if max_num_batched_tokens is None:
        whole_prompt = 0 if enable_chunked_prefill else max_model_len
        max_num_batched_tokens = max(2048, max_num_seqs, whole_prompt)
    return EngineConfig(
        num_blocks=num_blocks,
        num_swap_blocks=num_swap_blocks,
        max_model_len=max_model_len,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=enable_chunked_prefill,
        **others,
    )
