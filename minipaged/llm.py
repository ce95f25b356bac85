"""The front door: prompts in, RequestOutputs out."""

from collections.abc import Sequence as Many
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Literal, cast

import torch
from tqdm import tqdm

from minipaged.attention import choose_backend
from minipaged.batch import BatchBuilder
from minipaged.chat import Message, render_chat
from minipaged.config import EngineConfig, ModelConfig, PreemptionMode
from minipaged.engine import LLMEngine, Prompt
from minipaged.errors import CheckpointError, InvalidOption, InvalidRequest
from minipaged.kv_cache import KVCache
from minipaged.models import load_model
from minipaged.outputs import RequestOutput
from minipaged.parts import Parts
from minipaged.runner import ModelRunner, blocks_that_fit, choose_device
from minipaged.sampling import SamplingParams
from minipaged.tokenizer import Tokenizer

EMBEDDED = ("storyteller",)  # models that ship inside the package
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        num_swap_blocks: blocks in the swap pool in host memory; None: as many as in the pool.
        max_model_len: longest prompt and output together; None: what the model can take.
        gpu_memory_utilization: the part of a GPU's memory that weights and cache may fill.
        max_num_seqs: sequences in one step.
        max_num_batched_tokens: tokens in one step; None: 2,048, more where a whole prompt needs it.
        enable_chunked_prefill: whether a long prompt may be computed over several steps.
        preemption: "recompute", "swap", or "auto" as the paper does.
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
        seed: int = 0,
        parts: Parts | None = None,
    ) -> None:
        parts = parts or Parts()
        where = choose_device(device)
        kind = _choose_dtype(dtype)
        backend = parts.attention(choose_backend(attention_backend))
        self.folder = _find(model)
        loaded = load_model(self.folder, backend, dtype=kind, device=where)
        length = _choose_length(max_model_len, loaded.config)
        dtype_found = next(loaded.parameters()).dtype
        if num_blocks is None:
            enough = max_num_seqs * -(-length // max(block_size, 1))
            fit = blocks_that_fit(
                loaded.config, max(block_size, 1), dtype_found, where, gpu_memory_utilization
            )
            num_blocks = min(enough, fit)
        config = EngineConfig(
            num_blocks=num_blocks,
            num_swap_blocks=num_blocks if num_swap_blocks is None else num_swap_blocks,
            max_model_len=length,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens
            or max(2048, max_num_seqs, 0 if enable_chunked_prefill else length),
            enable_chunked_prefill=enable_chunked_prefill,
            preemption=preemption,
        )
        cache = KVCache(
            loaded.config,
            config.num_blocks,
            config.block_size,
            num_swap_blocks=config.num_swap_blocks,
            dtype=dtype_found,
            device=where,
        )
        batches = BatchBuilder(max_num_seqs, config.max_blocks_per_seq, block_size, where)
        self.engine = LLMEngine(
            config,
            parts.build_scheduler(config),
            batches,
            ModelRunner(loaded, cache),
            Tokenizer.from_folder(self.folder) if Tokenizer.is_in(self.folder) else None,
            seed=seed,
        )
        self._request_ids = count()

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if its folder holds none."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate after every prompt, all together, and return the results in the given order.

        Args:
            prompts: text or token ids; one or many.
            sampling_params: one for all, or one a prompt.
            use_tqdm: show a progress bar with tokens per second.

        Raises:
            InvalidRequest: a prompt can never be served. None of this call's prompts is then left
                in the engine; send the others again.
        """
        many = _as_list(prompts)
        params = _one_for_each(sampling_params, len(many))
        request_ids: list[str] = []
        try:
            for prompt, chosen in zip(many, params, strict=True):
                request_id = str(next(self._request_ids))
                self.engine.add_request(request_id, prompt, chosen)
                request_ids.append(request_id)
            return self._run(request_ids, use_tqdm)
        except BaseException:
            for request_id in request_ids:
                self.engine.abort_request(request_id)
            raise

    def chat(
        self,
        messages: list[Message] | Many[list[Message]],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
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

    def _run(self, request_ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        wanted = set(request_ids)
        num_tokens = 0
        with tqdm(total=len(request_ids), desc="prompts", disable=not use_tqdm) as bar:
            while len(finished) < len(request_ids):
                for output in self.engine.step():
                    if output.finished and output.request_id in wanted:
                        finished[output.request_id] = output
                        num_tokens += sum(len(o.token_ids) for o in output.outputs)
                        bar.update()
                elapsed = bar.format_dict["elapsed"]
                if elapsed > 0:
                    bar.set_postfix_str(f"{num_tokens / elapsed:.0f} tokens/s", refresh=False)
        return [finished[request_id] for request_id in request_ids]


def _find(model: str | Path) -> Path:
    if model in EMBEDDED:
        return Path(str(files("minipaged") / "assets" / str(model)))
    folder = Path(model)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {str(model)!r}: give a folder with a checkpoint, or the name of "
            f"an embedded model ({', '.join(EMBEDDED)})."
        )
    return folder


def _choose_dtype(dtype: str) -> torch.dtype | Literal["auto"]:
    if dtype == "auto":
        return "auto"
    if dtype not in DTYPES:
        raise InvalidOption(f"dtype is {dtype!r}: choose one of {', '.join(['auto', *DTYPES])}.")
    return DTYPES[dtype]


def _choose_length(asked: int | None, config: ModelConfig) -> int:
    longest = config.max_position_embeddings
    if asked is not None and asked > longest:
        raise InvalidOption(
            f"max_model_len is {asked}, but {config.architecture} was made for {longest} "
            f"tokens here: give at most {longest}."
        )
    return longest if asked is None else asked


def _as_list(prompts: Prompt | Many[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(p, int) for p in prompts):
        return [cast(list[int], list(prompts))]  # one prompt, in token ids
    return cast(list[Prompt], list(prompts))


def _one_for_each(
    params: SamplingParams | Many[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise InvalidRequest(
            f"{num_prompts} prompts came with {len(params)} sampling_params: give one for all, or "
            "one for each."
        )
    return list(params)
