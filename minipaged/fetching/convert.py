"""`pytorch_model.bin` to safetensors: the same tensors in a format that cannot run code.

A `.bin` file is a pickle, and a pickle may call any function while it is read. torch's restricted
reader refuses all but tensors; so a file that holds more is refused here, and never run.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minipaged.errors import CheckpointError
from minipaged.models.weight_files import find_shards

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def convert_to_safetensors(folder: Path) -> list[Path]:
    """Write the pickled weights of this folder as safetensors beside them, and return the files.

    One file becomes `model.safetensors`; shards become as many shards and an index, and only one
    of them is in memory at a time. The new files get their names together, when all are written.
    The pickled ones stay.

    Raises:
        CheckpointError: there is nothing to convert, or what there is is broken or would run code.
        OSError: the disk is full.
    """
    shards = find_pickled(folder)
    names: dict[str, str] = {}  # from tensor to file
    num_bytes = 0
    with TemporaryDirectory(prefix=".converting-", dir=folder) as scratch:
        for number, shard in enumerate(shards, start=1):
            many = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = many if len(shards) > 1 else "model.safetensors"
            tensors = _read_tensors(shard)
            names |= dict.fromkeys(tensors, name)
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            _write(tensors, Path(scratch) / name)
            shutil.copymode(shard, Path(scratch) / name)  # else it is for its owner's eyes only
            del tensors  # before the next shard is read
        if len(shards) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": names}
            path = Path(scratch) / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2), encoding="utf-8")
        # By name the index comes last, and without it shards are no checkpoint yet.
        return [file.replace(folder / file.name) for file in sorted(Path(scratch).iterdir())]


def find_pickled(folder: Path) -> list[Path]:
    """The pickled weights in this folder: one file, or the shards that the index names.

    Raises:
        CheckpointError: there are none, some are missing, or there are safetensors already.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give one that holds {SINGLE}.")
    if any(folder.glob("model*.safetensors")):
        raise CheckpointError(
            f"{folder} holds safetensors already, and nothing is left to convert: load it as it is."
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}: give another folder.")
    return find_shards(folder / INDEX)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor in a pickled file, each with memory of its own, as safetensors demands."""
    state = _unpickle(path)
    if not isinstance(state, dict) or not state:
        what = type(state).__name__
        raise CheckpointError(f"{path} holds a {what} and no tensors by name: {_GET}.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds a {type(value).__name__} under {name!r}, where a tensor should be: "
                f"{_GET}."
            )
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    # The output matrix last: where it is the embedding itself, it is left out, and a model that
    # ties the two needs it once only. Whatever else shares memory gets a copy.
    for name in sorted(state, key=lambda name: name.endswith("lm_head.weight")):
        tensor: Tensor = state[name]
        shared = tensor.untyped_storage().data_ptr() in seen
        if shared and name.endswith("lm_head.weight"):
            continue
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
    return tensors


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # of a full disk, say, only in its text
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


_GET = "get the checkpoint as safetensors"


def _unpickle(path: Path) -> Any:
    # Mapped into memory, the file is read as it is written out again. The format before torch 1.6,
    # which was no zip file, cannot be.
    mapped = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+\.\S+)", str(error))  # the function that it names
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path} asks for more than tensors{what}, and reading it could run code: {_GET}."
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} of {size} bytes is cut short or no file of torch's: download it again."
        ) from error
