"""Where a fetch puts its files until all are there, and what it may delete: only its own.

`.<name>.minipaged-partial` is next to the target and becomes it by one rename at the end. What a
broken transfer left is found there again by its name: a file has its own only once its checksum was
right, and until then it has its checksum in its name. This is all the state there is.
"""

import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from minipaged.errors import FetchError
from minipaged.models.hub.hub import BESIDE_THE_WEIGHTS, SHARD, Offer, RemoteFile
from minipaged.models.hub.local_models import ModelName, folder_of

SOURCE = "source.json"  # what was fetched: written last, and then all is there
SCRATCH = ".minipaged-converting-"  # folders in which a conversion writes begin like this

# All that a fetch of any model can have left.
_OURS = re.compile(
    rf"({'|'.join(map(re.escape, (*BESIDE_THE_WEIGHTS, SOURCE)))}|{SHARD.pattern}(\.index\.json)?)"
    r"(\.[0-9a-f]{16}\.part)?"
)


def target_of(model: ModelName, directory: str | Path | None) -> Path:
    """The folder that the model shall be in, with no link left in its path. Raises FetchError."""
    try:
        chosen = folder_of(model) if directory is None else Path(directory).expanduser()
        return chosen.resolve()
    except (RuntimeError, ValueError) as error:  # ~nobody, a link to itself, a zero in it
        reason = str(error).strip(".")
        given = "MINIPAGED_HOME" if directory is None else directory
        raise FetchError(
            f"{given} leads to no folder ({reason}): give another directory."
        ) from error


def refuse_to_replace(target: Path, model: ModelName) -> None:
    """Raise FetchError for what the rename at the end could not or should not replace."""
    if target.is_mount():
        what = "a mount point"
    elif target == Path.cwd():
        what = "the current directory"
    else:
        return
    raise FetchError(
        f"{target} is {what}, and a fetch puts a new folder in its place: give one within it, "
        f"{target / model.folder_name}."
    )


@contextmanager
def alone(target: Path, model: ModelName) -> Generator[None, None, None]:
    """Two downloads at once would write into the same files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.minipaged-lock"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise _in_the_way(path)
    lock = FileLock(path, timeout=0)
    try:
        with lock:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout:
        raise FetchError(
            f"another process is fetching {model} into {target}: wait until it has finished."
        ) from None


def staging_of(target: Path) -> Path:
    """The folder that becomes the target. Raises FetchError: something else has its name."""
    staging = target.parent / f".{target.name}.minipaged-partial"
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        raise _in_the_way(staging)
    return staging


def drop_leftovers(offer: Offer, staging: Path) -> None:
    """Keep of an earlier try what can be of use: files by their own name, and beginnings of them.

    Raises FetchError, and deletes nothing, if there is what no fetch can have left.
    """
    paths = list(staging.iterdir())
    for path in paths:
        scratch = path.name.startswith(SCRATCH) and path.is_dir()
        if path.is_symlink() or not (scratch or (path.is_file() and _OURS.fullmatch(path.name))):
            raise _in_the_way(path)
    drop_scratch(staging)
    wanted = {file.name for file in offer.files}
    lengths = {beginning_of(staging, file).name: file.num_bytes for file in offer.files}
    for path in staging.iterdir():
        if path.name not in wanted and path.stat().st_size > lengths.get(path.name, -1):
            path.unlink()


def drop_scratch(folder: Path) -> None:
    """Remove what a conversion in this folder left when it was killed."""
    for path in folder.glob(f"{SCRATCH}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def beginning_of(staging: Path, file: RemoteFile) -> Path:
    """Where a file grows. Named by its checksum: another version of it has another beginning."""
    return staging / f"{file.name}.{file.checksum.partition(':')[2][:16]}.part"


def num_bytes_in(folder: Path) -> int:
    """Of all files directly in it."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def remove_if_empty(staging: Path) -> None:
    """Remove beginnings of no byte, and then the folder, if nothing else is there."""
    if not staging.is_dir():
        return
    for path in staging.glob("*.part"):
        if _OURS.fullmatch(path.name) and path.stat().st_size == 0:
            path.unlink()
    with suppress(OSError):
        staging.rmdir()


def _in_the_way(path: Path) -> FetchError:
    return FetchError(f"{path} is in the way, and no fetch has left it there: move it elsewhere.")
