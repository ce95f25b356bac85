"""Atomic writes, and reading JSON with clear errors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minipaged.errors import CheckpointError, InvalidOption


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary file and rename it. Raises InvalidOption if the write fails."""
    if path.is_dir() or not path.name:
        raise InvalidOption(f"{str(path)!r} is a folder: give the name of a file.")
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", errors="replace")
        )
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InvalidOption(
            f"{path} cannot be written ({error.strerror}): give another path."
        ) from error


def write_new_files(contents: Mapping[Path, str], force: bool) -> None:
    """Write text files, and create their folders. Raises InvalidOption.

    If a file exists already and `force` is not set, nothing is written.
    """
    existing = [path for path in contents if path.exists()]
    if existing and not force:
        others = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise InvalidOption(
            f"{existing[0]}{others} exists already: give another folder, or --force to overwrite."
        )
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidOption(
                f"{path.parent} cannot be created ({error.strerror}): give another folder."
            ) from error
        write_atomically(path, content)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises CheckpointError."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): check that it exists and is readable."
        ) from error
    except (ValueError, RecursionError) as error:  # neither JSON nor, perhaps, text
        raise CheckpointError(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} is JSON, but not an object: download it again.")
    return parsed
