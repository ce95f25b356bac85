"""From a name on the hub to a folder that loads: downloaded, checked, converted, then named.

Everything happens in a folder beside the target, `<target>.partial`, which becomes the target by
one rename at the end. So the target is whole or absent. What a broken transfer left is found again
by its name: in the staging folder, a file has its own name only once its checksum was right, and
until then it has its checksum in its name. This is all the state there is.
"""

import hashlib
import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from minipaged.errors import CheckpointError, FetchError
from minipaged.fetching.catalogue import in_words
from minipaged.fetching.hub import CONFIG, DISK_IS_FULL, Offer, RemoteFile, ask_hub, receive
from minipaged.fetching.local_models import ModelName, find_local, folder_of

SOURCE = "source.json"  # what was fetched, when it is whole: written last


def fetch(
    name: str,
    *,
    revision: str | None = None,
    directory: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """The folder of a model, which is downloaded if it is not on this machine yet.

        >>> LLM(fetch("HuggingFaceTB/SmolLM2-135M-Instruct"))

    Whoever wants to ask first calls `find_here`, then `ask_hub` for the size, then `download`.

    Args:
        name: "owner/name", "owner/name@revision", or a listed model's name without its owner.
        revision: a branch, tag or commit; None: what the hub shows first.
        directory: the folder to put it into; None: one of its own under `models_folder()`.
        progress: whether a terminal shows a progress bar on standard error.

    Raises:
        FetchError: the hub, the network, the disk or a checksum forbids it. What was received is
            kept, and the next call goes on from there.
        CheckpointError: what was downloaded cannot be loaded here. It is not kept.
    """
    model = ModelName.parse(name, revision)
    return find_here(model, directory) or download(ask_hub(model), directory, progress=progress)


def find_here(model: ModelName, directory: str | Path | None = None) -> Path | None:
    """The folder where this model lies already, without asking anybody; None: it must be fetched.

    Raises:
        FetchError: `directory` holds something else.
    """
    if directory is None:
        return find_local(model)
    target = Path(directory).expanduser().absolute()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    try:
        source: Any = json.loads((target / SOURCE).read_text(encoding="utf-8"))
        same = ModelName(source["asked_for"], source["revision"]) == model
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise FetchError(f"{target} is not empty and holds no {model}: give another directory.")
    return target


def download(offer: Offer, directory: str | Path | None = None, *, progress: bool = True) -> Path:
    """Bring what the hub offers into its folder; arguments and errors as for `fetch`."""
    target = folder_of(offer.model) if directory is None else Path(directory)
    target = target.expanduser().absolute()
    staging = target.with_name(target.name + ".partial")
    with _alone(target, offer):
        found = find_here(offer.model, target)  # another process may just have finished
        if found is not None:
            return found
        try:
            _receive_all(offer, staging, progress)
            _make_loadable(offer, staging)
            _write_source(offer, staging)
        except CheckpointError:
            shutil.rmtree(staging)  # more of it would not help
            raise
        except FetchError as error:
            what = str(error).removesuffix(".")
            raise FetchError(what + _what_is_kept(offer, staging)) from error
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            what = f"the disk of {target.parent} is full: free some of it"
            raise FetchError(what + _what_is_kept(offer, staging)) from error
        finally:
            _remove_if_empty(staging)
        staging.replace(target)
    return target


@contextmanager
def _alone(target: Path, offer: Offer) -> Generator[None, None, None]:
    """Two downloads at once would write into the same files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(target.name + ".lock"), timeout=0)
    try:
        with lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise FetchError(
            f"another process is fetching {offer.model} into {target}: wait until it has finished."
        ) from None


# ------------------------------------------------------------------------------------- the bytes


def _receive_all(offer: Offer, staging: Path, progress: bool) -> None:
    staging.mkdir(exist_ok=True)
    _drop_leftovers(offer, staging)
    missing = [file for file in offer.files if not (staging / file.name).exists()]
    kept = _num_bytes(staging)
    _refuse_without_room(offer, staging, offer.num_bytes - kept)
    from minipaged.models.loader import read_model_config  # torch, only now

    with tqdm(
        total=offer.num_bytes,
        initial=kept,
        desc=offer.repo,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,  # None: only a terminal shows it
    ) as bar:
        for file in missing:
            _receive_one(offer, file, staging, bar)
            if file.name == CONFIG:
                read_model_config(staging)  # an architecture not built here: before gigabytes come


def _drop_leftovers(offer: Offer, staging: Path) -> None:
    """Keep of an earlier try what is right: whole files, and beginnings of these very files."""
    wanted = {file.name: file for file in offer.files}
    beginnings = {_beginning(staging, file).name for file in offer.files}
    for path in staging.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name in beginnings:
            continue
        elif path.name not in wanted or not _is_right(path, wanted[path.name]):
            path.unlink()


def _beginning(staging: Path, file: RemoteFile) -> Path:
    """Where a file grows. Named by its checksum: another version of it has another beginning."""
    return staging / f"{file.name}.{file.checksum.partition(':')[2][:16]}.part"


def _receive_one(offer: Offer, file: RemoteFile, staging: Path, bar: "tqdm[Any]") -> None:
    beginning = _beginning(staging, file)
    try:
        with beginning.open("ab") as opened:
            receive(offer, file, opened, bar)
    finally:
        if beginning.stat().st_size > file.num_bytes:  # a server gave more than was asked for
            beginning.unlink()
    if not _is_right(beginning, file):
        beginning.unlink()
        raise FetchError(
            f"{file.name} of {offer.model} came with a wrong checksum: it was thrown away, fetch "
            "again."
        )
    beginning.replace(staging / file.name)


def _is_right(path: Path, file: RemoteFile) -> bool:
    """Whether the file has the checksum that the hub named for it."""
    kind, _, expected = file.checksum.partition(":")
    if kind == "sha256":
        digest = hashlib.sha256()
    else:  # small files lie in git, which puts its kind and length before what it hashes
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == expected


# ---------------------------------------------------------------------------------------- the disk


def _refuse_without_room(offer: Offer, staging: Path, to_come: int) -> None:
    to_convert = sum(file.num_bytes for file in offer.pickled)  # the old and the new lie there both
    free = shutil.disk_usage(staging).free
    if to_come + to_convert > free:
        both = f", of which {in_words(to_convert)} to convert its weights" if to_convert else ""
        raise FetchError(
            f"{offer.model} needs {in_words(to_come + to_convert)}{both}, and the disk of "
            f"{staging.parent} has {in_words(free)} free: free some of it, or give a directory on "
            "another disk."
        )


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _what_is_kept(offer: Offer, staging: Path) -> str:
    kept = _num_bytes(staging) if staging.is_dir() else 0
    if kept == 0:
        return "."
    of_all = f"{in_words(kept)} of {in_words(offer.num_bytes)}"
    return f" ({of_all} are kept, and the same command goes on from there)."


def _remove_if_empty(staging: Path) -> None:
    if staging.is_dir() and _num_bytes(staging) == 0:
        shutil.rmtree(staging)


# ----------------------------------------------------------------------------------- the checkpoint


def _make_loadable(offer: Offer, staging: Path) -> None:
    """Convert what is pickled, and see that the weights are those that config.json speaks of."""
    from minipaged.fetching.convert import convert_to_safetensors
    from minipaged.models.loader import check_checkpoint

    if offer.pickled:
        convert_to_safetensors(staging)
        for file in offer.pickled:
            (staging / file.name).unlink()
    check_checkpoint(staging)


def _write_source(offer: Offer, staging: Path) -> None:
    source = {
        "asked_for": offer.model.repo,
        "revision": offer.model.revision,
        "repo": offer.repo,
        "commit": offer.commit,
        "licence": offer.licence,
        "endpoint": offer.endpoint,
        "files": [asdict(file) for file in offer.files],  # as downloaded, before any conversion
    }
    (staging / SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
