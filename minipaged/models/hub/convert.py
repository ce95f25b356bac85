"""`pytorch_model.bin` to safetensors: the same tensors in a format that cannot run code.

A `.bin` file is a pickle, and a pickle may call any function while it is read. torch's restricted
reader refuses everything but tensors, so code in a file is never run.
"""

import errno
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minipaged.errors import CheckpointError
from minipaged.models.hub.catalogue import in_words
from minipaged.models.hub.failures import THIS_MACHINE
from minipaged.models.hub.staging import SCRATCH, drop_scratch
from minipaged.models.safetensors_reader import find_shards

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_GET = "get the checkpoint as safetensors"


class UnreadablePickle(CheckpointError):
    """torch cannot read this file: it is truncated, or has another format."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f"{path} of {path.stat().st_size} bytes is cut short or not a torch file ({reason}): "
            "download it again."
        )


def convert_to_safetensors(folder: Path) -> list[Path]:
    """Convert the pickled weights of this folder to safetensors in it; return the new files.

    One file becomes `model.safetensors`; shards become as many shards and an index, with only one
    of them in memory at a time. The new files are renamed together, when all are written. The
    pickled files are kept.

    Raises:
        CheckpointError: there are no pickled weights, or they are broken or would run code.
        OSError: the disk is full, or there is too little memory.
    """
    shards = find_pickled(folder)
    names: dict[str, str] = {}  # from tensor to file
    num_bytes = 0
    drop_scratch(folder)
    with TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        for number, shard in enumerate(shards, start=1):
            many = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = many if len(shards) > 1 else "model.safetensors"
            with _failures_told(shard):
                tensors = _read_tensors(shard)
                names |= dict.fromkeys(tensors, name)
                num_bytes += sum(tensor.nbytes for tensor in tensors.values())
                save_file(tensors, Path(scratch) / name, metadata={"format": "pt"})
            shutil.copymode(shard, Path(scratch) / name)  # otherwise only its owner could read it
            del tensors  # free it before the next shard is read
        if len(shards) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": names}
            path = Path(scratch) / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2), encoding="utf-8")
        # The index sorts last, and shards without it are not a checkpoint.
        return [file.replace(folder / file.name) for file in sorted(Path(scratch).iterdir())]


def find_pickled(folder: Path) -> list[Path]:
    """The pickled weights in this folder: one file, or the shards that the index lists.

    Raises:
        CheckpointError: there are none, some are missing, or there are safetensors already.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give one that contains {SINGLE}.")
    if any(folder.glob("model*.safetensors")):
        raise CheckpointError(
            f"{folder} already contains safetensors, so there is nothing to convert: load it as it "
            "is."
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} contains neither {SINGLE} nor {INDEX}: give another folder."
        )
    return find_shards(folder / INDEX)


# ---------------------------------------------------------------------------------- one file


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor in a pickled file, each with its own memory, as safetensors requires."""
    state = _unpickle(path)
    if not isinstance(state, dict) or not state:
        what = type(state).__name__
        raise CheckpointError(f"{path} contains a {what} without named tensors: {_GET}.")
    for name, value in state.items():
        _refuse_all_but_tensors(path, name, value)
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    views: set[tuple[Any, ...]] = set()
    # The output matrix comes last: if it is the embedding itself, it is omitted, since a model that
    # ties the two needs it only once. Other tensors that share memory are copied.
    for name in sorted(state, key=lambda name: name.endswith("lm_head.weight")):
        tensor: Tensor = state[name]
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if name.endswith("lm_head.weight") and view in views:
            continue
        shared = tensor.untyped_storage().data_ptr() in storages
        storages.add(tensor.untyped_storage().data_ptr())
        views.add(view)
        own = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        tensors[name] = own.resolve_neg()  # resolve lazy negation, which is not in the bytes
    return tensors


def _unpickle(path: Path) -> Any:
    # Map the file, so that it is read only while it is converted. The format before torch 1.6,
    # which is not a zip file, cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+\.\S+)", str(error))  # the function that the pickle names
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path} contains more than tensors{what}, and reading it could run code: {_GET}."
        ) from error
    except Exception as error:  # torch raises many types for a broken file
        if _errno_in(error) is not None:
            raise
        raise UnreadablePickle(path, _reason(error)) from error


def _refuse_all_but_tensors(path: Path, name: object, value: object) -> None:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        what = f"a {type(value).__name__}"
    elif not name.isprintable() or name == "__metadata__":
        raise CheckpointError(
            f"{path} contains a tensor under {name!a}, which is not a name: {_GET}."
        )
    elif value.is_nested or value.layout != torch.strided:
        what = "a sparse or nested tensor"
    elif value.is_quantized:
        what = "a quantized tensor"
    elif value.is_complex():
        what = "complex numbers"
    elif value.is_meta:
        what = "a tensor without data"
    else:
        return
    raise CheckpointError(
        f"{path} contains {what} under {name!a}, where a tensor should be: {_GET}."
    )


# ---------------------------------------------------------------------------------------- failures


@contextmanager
def _failures_told(path: Path) -> Generator[None, None, None]:
    """Convert failures of this machine to OSError, whatever torch and safetensors raise."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        number = _errno_in(error)
        if number is None and isinstance(error, OSError):
            raise
        if number is None:
            raise CheckpointError(
                f"{path} contains data that safetensors does not support ({_reason(error)}): "
                f"{_GET}."
            ) from error
        reason = os.strerror(number)
        if number == errno.ENOMEM:
            size = in_words(path.stat().st_size)
            reason = f"too little memory to convert {size}: close other programs, and try again"
        raise OSError(number, reason, str(path)) from error


def _errno_in(error: Exception) -> int | None:
    """The operating system's error number, possibly parsed from the text; None: there is none."""
    if isinstance(error, OSError):
        return error.errno if error.errno in THIS_MACHINE else None
    said = str(error)
    if isinstance(error, MemoryError) or re.search("(not|n't) (enough|allocate) memory", said):
        return errno.ENOMEM
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", said)
    else:
        number = re.search(r"unable to \w+ .*\((\d+)\)", said)  # torch's wording
    return int(number[1]) if number else None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].strip(" .:")[:150] if lines else "") or type(error).__name__
