"""The cost of loading a checkpoint: peak memory over the weights' bytes, and time.

Every load runs in a separate process, which records its resident memory before the load and its
peak at the end. The interpreter and torch are therefore not counted; weights, buffers and pages of
mapped files are. Every weight is read once before the end, because a mapped file is not loaded
until it is read. The files have just been written and are in the system's page cache, so the time
is that of copying, not of a disk.

`transformers` does the same for comparison, if it is installed.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from minipaged.attention.backend import BACKENDS
from minipaged.errors import InvalidOption
from minipaged.models.loader import DTYPES, FAMILIES, Unset, load_model

# GPT-2 small, whose embedding is 31 % of all weights, and a model whose embedding is 73 %.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "gpt2, small": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "llama, large vocabulary": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}
FROM_AND_TO = (  # saved in, run in
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("bfloat16", "bfloat16"),
)
NUM_SHARDS = 4


@dataclass(frozen=True)
class Row:
    """One load in a fresh process."""

    checkpoint: str
    num_files: int
    saved: str
    dtype: str
    loader: str
    weight_bytes: int
    peak_bytes: int  # highest resident memory, minus that before loading
    seconds: float


def measure(model: Path | None = None) -> Iterator[Row]:
    """Measure all loads, of the checkpoint in this folder or of generated ones.

    Raises:
        InvalidOption: the system does not report the peak memory of a process.
    """
    if not Path("/proc/self/status").exists():
        raise InvalidOption(
            "the peak of a process's memory is read from /proc, which only Linux has: run it there."
        )
    if model is not None:
        num_files = len(list(model.glob("*.safetensors")))
        for dtype in ("float32", "bfloat16"):
            yield from _measure_all(model, model.name, num_files, "as it is", dtype)
        return
    for name, hf in CHECKPOINTS.items():
        for saved in dict.fromkeys(saved for saved, _ in FROM_AND_TO):
            for num_files in (1, NUM_SHARDS):
                with tempfile.TemporaryDirectory() as folder:
                    make_checkpoint(hf, Path(folder), DTYPES[saved], num_files)
                    for dtype in (to for of, to in FROM_AND_TO if of == saved):
                        yield from _measure_all(Path(folder), name, num_files, saved, dtype)


def make_checkpoint(
    hf: dict[str, Any], folder: Path, dtype: torch.dtype, num_files: int = 1
) -> None:
    """Write config.json and random weights, in one file or in shards with their index."""
    family = FAMILIES[hf["architectures"][0]]
    (folder / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    with torch.device("meta"), Unset():
        model = family.build(family.read_config(hf), BACKENDS["reference"])
    shards: list[dict[str, Tensor]] = [{} for _ in range(num_files)]
    for number, placement in enumerate(family.weights.placements(model)):
        tensor = torch.randn(placement.place_in(model).shape).to(dtype)
        shards[number % num_files][family.weights.prefix + placement.tensor] = tensor
    metadata = {"format": "pt"}  # transformers asks for it
    if num_files == 1:
        save_file(shards[0], folder / "model.safetensors", metadata)
        return
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{num_files:05}.safetensors"
        save_file(tensors, folder / file_name, metadata)
        weight_map |= dict.fromkeys(tensors, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _measure_all(
    folder: Path, checkpoint: str, num_files: int, saved: str, dtype: str
) -> Iterator[Row]:
    loaders = ["minipaged"] + ["transformers"] * (find_spec("transformers") is not None)
    for loader in loaders:
        figures = load_in_new_process(folder, dtype, loader)
        yield Row(checkpoint, num_files, saved, dtype, loader, **figures)


# ------------------------------------------------------------------------- in a process of its own


def load_in_new_process(folder: Path, dtype: str, loader: str = "minipaged") -> dict[str, Any]:
    """Load in a fresh process; returns weight_bytes, peak_bytes and seconds (Linux only)."""
    command = [sys.executable, "-m", __name__, str(folder), dtype, loader]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(run.stdout.splitlines()[-1])


def _load_and_report(folder: Path, dtype: str, loader: str) -> None:
    prepare = _prepare_transformers if loader == "transformers" else _prepare_minipaged
    load = prepare(folder, dtype)
    before = forget_the_peak()
    begin = time.perf_counter()
    model = load()
    for parameter in model.parameters():
        parameter.max()
    seconds = time.perf_counter() - begin
    peak = resident_bytes("VmHWM") - before
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"weight_bytes": weight_bytes, "peak_bytes": peak, "seconds": seconds}))


def _prepare_minipaged(folder: Path, dtype: str) -> Callable[[], nn.Module]:
    return lambda: load_model(folder, BACKENDS["torch"], dtype)


def _prepare_transformers(folder: Path, dtype: str) -> Callable[[], nn.Module]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):  # imports what it needs
        transformers.AutoModelForCausalLM.from_config(config)
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])


def forget_the_peak(pid: int | str = "self") -> int:
    """Reset a process's peak to its current resident memory, and return it."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")
    return resident_bytes("VmRSS", pid)


def resident_bytes(which: str, pid: int | str = "self") -> int:
    """Memory of this process. VmRSS: now. VmHWM: the peak."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith(which)]
    return 1024 * int(kib)


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    for title in ("checkpoint", "files", "saved in", "run in", "loader"):
        table.add_column(title)
    for title in ("weights", "peak", "peak / weights", "time"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            str(row.num_files),
            row.saved,
            row.dtype,
            row.loader,
            f"{row.weight_bytes / 1e6:.0f} MB",
            f"{row.peak_bytes / 1e6:.0f} MB",
            f"{row.peak_bytes / row.weight_bytes:.2f}",
            f"{row.seconds:.2f} s",
        )
    return table


if __name__ == "__main__":
    _load_and_report(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
