"""Fetches a model from the hub: download, check, convert, rename.

The target is complete or absent: until the end, all files are in a folder next to it.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipaged.errors import CheckpointError, FetchError
from minipaged.models.hub.catalogue import in_words
from minipaged.models.hub.failures import DISK_IS_FULL
from minipaged.models.hub.hub import CONFIG, Offer, RemoteFile, ask_hub, receive
from minipaged.models.hub.local_models import ModelName, find_local
from minipaged.models.hub.staging import (
    SOURCE,
    alone,
    beginning_of,
    drop_leftovers,
    num_bytes_in,
    refuse_to_replace,
    remove_if_empty,
    staging_of,
    target_of,
)
from minipaged.utils.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm


def fetch(
    name: str,
    *,
    revision: str | None = None,
    directory: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Return the folder of a model, after downloading it if it is not on this machine.

        >>> LLM(fetch("HuggingFaceTB/SmolLM2-135M-Instruct"))

    To ask for consent first, call `find_here`, then `ask_hub` for the size, then `download`.

    Args:
        name: "owner/name", "owner/name@revision", or a listed model's name without its owner.
        revision: a branch, tag or commit; None: the default revision.
        directory: the target folder; None: a folder under `models_folder()`.
        progress: whether to show a progress bar on standard error, if it is a terminal.

    Raises:
        FetchError: the hub, the network, the disk or a checksum failed. Received bytes are kept,
            and the next call resumes.
        CheckpointError: the downloaded model cannot be loaded. It is not kept.
        OSError: disk, memory or permissions of this machine failed. Received bytes are kept.
    """
    model = ModelName.parse(name, revision)
    return find_here(model, directory) or download(ask_hub(model), directory, progress=progress)


def find_here(model: ModelName, directory: str | Path | None = None) -> Path | None:
    """The local folder of this model, found without the network; None: it must be fetched.

    Raises:
        FetchError: `directory` contains something else.
    """
    if directory is None:
        return find_local(model)
    target = target_of(model, directory)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        refuse_to_replace(target, model)
        return None
    try:
        source: Any = json.loads((target / SOURCE).read_text(encoding="utf-8"))
        same = ModelName.parse(source["asked_for"], source["revision"]) == model
    except (OSError, ValueError, LookupError, TypeError, AttributeError, FetchError):
        same = False
    if not same:
        raise FetchError(f"{target} is not empty and contains no {model}: give another directory.")
    return target


def download(offer: Offer, directory: str | Path | None = None, *, progress: bool = True) -> Path:
    """Download the model to its folder; arguments and errors as for `fetch`."""
    target = target_of(offer.model, directory)
    with alone(target, offer.model):
        found = find_here(offer.model, target)  # another process may have just finished
        if found is not None:
            return found
        staging = staging_of(target)
        # An earlier attempt may have been killed just before the rename. Without this check,
        # neither the old nor the new weights would look right.
        finished = _is_finished(offer, staging)
        if not finished:
            staging.mkdir(exist_ok=True)
            drop_leftovers(offer, staging)
        with _told_what_is_kept(offer, staging):
            if not finished:
                _receive_all(offer, staging, progress)
                _make_loadable(offer, staging)
                (staging / SOURCE).write_text(_source(offer), encoding="utf-8")
            for file in offer.pickled:
                (staging / file.name).unlink(missing_ok=True)
            staging.replace(target)
    return target


@contextmanager
def _told_what_is_kept(offer: Offer, staging: Path) -> Generator[None, None, None]:
    """If a fetch fails, keep the received bytes and report their size."""
    try:
        yield
    except CheckpointError as error:
        if not isinstance(error.__cause__, OSError):  # which would be an error of this machine
            shutil.rmtree(staging)  # resuming would not help
        raise
    except FetchError as error:
        what = str(error).removesuffix(".")
        raise FetchError(what + _what_is_kept(offer, staging)) from error
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        what = f"the disk of {staging.parent} is full: free some of it"
        raise FetchError(what + _what_is_kept(offer, staging)) from error
    except KeyboardInterrupt:
        kept = _what_is_kept(offer, staging)
        print(f"fetching {offer.model} was interrupted{kept}", file=sys.stderr)
        raise
    finally:
        remove_if_empty(staging)


# ------------------------------------------------------------------------------------- the bytes


def _receive_all(offer: Offer, staging: Path, progress: bool) -> None:
    here = {file for file in offer.files if _is_right(staging / file.name, file)}
    missing = [file for file in offer.files if file not in here]
    for file in missing:
        (staging / file.name).unlink(missing_ok=True)
    kept = num_bytes_in(staging)
    _refuse_without_room(offer, staging, offer.num_bytes - kept)
    from minipaged.models.loader import read_model_config  # torch, only now

    with progress_bar(
        total=offer.num_bytes,
        initial=kept,
        desc=offer.repo,
        unit="B",
        unit_scale=True,
        shown=None if progress else False,
    ) as bar:
        for file in missing:
            _receive_one(offer, file, staging, bar)
            if file.name == CONFIG:
                read_model_config(staging)  # refuse an unsupported architecture early


def _receive_one(offer: Offer, file: RemoteFile, staging: Path, bar: "tqdm[Any]") -> None:
    beginning = beginning_of(staging, file)
    try:
        with beginning.open("ab") as opened:
            receive(offer, file, opened, bar)
    except OSError as error:  # of this machine: network errors are FetchErrors
        error.filename = error.filename or str(beginning)
        raise
    if not _is_right(beginning, file):
        beginning.unlink()
        raise FetchError(
            f"{file.name} of {offer.model} had a wrong checksum and was discarded: fetch again."
        )
    beginning.replace(staging / file.name)


def _is_right(path: Path, file: RemoteFile) -> bool:
    """Whether the file exists and has the checksum that the hub lists for it."""
    if not path.is_file():
        return False
    kind, _, expected = file.checksum.partition(":")
    if kind == "sha256":
        digest = hashlib.sha256()
    else:  # git's checksum of small files includes their type and length
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == expected


# ---------------------------------------------------------------------------------------- the disk


def _refuse_without_room(offer: Offer, staging: Path, to_come: int) -> None:
    to_convert = sum(file.num_bytes for file in offer.pickled)  # both formats at once
    free = shutil.disk_usage(staging).free
    if to_come + to_convert > free:
        both = f", of which {in_words(to_convert)} to convert its weights" if to_convert else ""
        raise FetchError(
            f"{offer.model} needs {in_words(to_come + to_convert)}{both}, but the disk of "
            f"{staging.parent} has {in_words(free)} free: free some of it, or give a directory on "
            "another disk."
        )


def _what_is_kept(offer: Offer, staging: Path) -> str:
    kept = num_bytes_in(staging) if staging.is_dir() else 0
    if kept == 0:
        return "."
    of_all = f"{in_words(kept)} of {in_words(offer.num_bytes)}"
    return f" ({of_all} are kept, and the same command resumes from there)."


# ----------------------------------------------------------------------------------- the checkpoint


def _make_loadable(offer: Offer, staging: Path) -> None:
    """Convert pickled weights, and check that the weights match config.json."""
    from minipaged.models.hub.convert import UnreadablePickle, convert_to_safetensors
    from minipaged.models.loader import check_checkpoint

    if offer.pickled:
        try:
            convert_to_safetensors(staging)
        except UnreadablePickle as error:
            raise FetchError(
                f"{error.path.name} of {offer.model} has the right checksum, but torch cannot read "
                f"it ({error.reason}): choose another revision or model."
            ) from error
    check_checkpoint(staging)


def _is_finished(offer: Offer, staging: Path) -> bool:
    """Whether an earlier attempt completed everything but the rename."""
    source = staging / SOURCE
    return source.is_file() and source.read_bytes() == _source(offer).encode()


def _source(offer: Offer) -> str:
    source = {
        "asked_for": offer.model.repo,
        "revision": offer.model.revision,
        "repo": offer.repo,
        "commit": offer.commit,
        "licence": offer.licence,
        "endpoint": offer.hub,
        "files": [asdict(file) for file in offer.files],  # as downloaded, before any conversion
    }
    return json.dumps(source, indent=2) + "\n"
