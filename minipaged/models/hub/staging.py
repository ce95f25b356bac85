"""The folder where a fetch collects its files until it is complete; it deletes only its own files.

`.<name>.minipaged-partial` is next to the target and is renamed to it at the end. A broken transfer
is resumed by file name: a file gets its final name after its checksum was verified, and until then
its name contains the checksum. There is no other state.
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

SOURCE = "source.json"  # describes the fetch: written last, when all files are there
SCRATCH = ".minipaged-converting-"  # prefix of the folders that a conversion writes to

# All file names that a fetch of any model can leave.
_OURS = re.compile(
    rf"({'|'.join(map(re.escape, (*BESIDE_THE_WEIGHTS, SOURCE)))}|{SHARD.pattern}(\.index\.json)?)"
    r"(\.[0-9a-f]{16}\.part)?"
)


def target_of(model: ModelName, directory: str | Path | None) -> Path:
    """The target folder, with links in its path resolved. Raises FetchError."""
    try:
        chosen = folder_of(model) if directory is None else Path(directory).expanduser()
        return chosen.resolve()
    except (RuntimeError, ValueError) as error:  # ~nobody, a link to itself, a null byte
        reason = str(error).strip(".")
        given = "MINIPAGED_HOME" if directory is None else directory
        raise FetchError(
            f"{given} is not a valid folder ({reason}): give another directory."
        ) from error


def refuse_to_replace(target: Path, model: ModelName) -> None:
    """Raise FetchError if the rename at the end could not or should not replace the target."""
    if target.is_mount():
        what = "a mount point"
    elif target == Path.cwd():
        what = "the current directory"
    else:
        return
    raise FetchError(
        f"{target} is {what}, which a fetch would have to replace: give a folder within it, such "
        f"as {target / model.folder_name}."
    )


@contextmanager
def alone(target: Path, model: ModelName) -> Generator[None, None, None]:
    """Prevents two downloads from writing to the same files."""
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
    """The folder that becomes the target. Raises FetchError if something else has its name."""
    staging = target.parent / f".{target.name}.minipaged-partial"
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        raise _in_the_way(staging)
    return staging


def drop_leftovers(offer: Offer, staging: Path) -> None:
    """Keep the useful files of an earlier attempt: complete ones and partial downloads.

    Raises FetchError, and deletes nothing, if the folder contains anything that is not a fetch's.
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
    """Remove the files of a conversion that was killed in this folder."""
    for path in folder.glob(f"{SCRATCH}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def beginning_of(staging: Path, file: RemoteFile) -> Path:
    """The path of a partial download, named by its checksum: other versions have other bytes."""
    return staging / f"{file.name}.{file.checksum.partition(':')[2][:16]}.part"


def num_bytes_in(folder: Path) -> int:
    """Bytes of all files directly in the folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def remove_if_empty(staging: Path) -> None:
    """Remove empty partial downloads, then the folder if it is empty."""
    if not staging.is_dir():
        return
    for path in staging.glob("*.part"):
        if _OURS.fullmatch(path.name) and path.stat().st_size == 0:
            path.unlink()
    with suppress(OSError):
        staging.rmdir()


def _in_the_way(path: Path) -> FetchError:
    return FetchError(f"{path} is in the way, but is not from a fetch: move it elsewhere.")
