"""A file that is whole or absent, whenever its writer is stopped."""

from pathlib import Path

from minipaged.errors import InvalidOption


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside the place, then rename. Raises InvalidOption if nothing can be written there."""
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
            f"{path} cannot be written ({error.strerror}): give another place."
        ) from error
