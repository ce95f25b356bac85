"""JSON files of a checkpoint, read with a sentence for whatever is wrong with them."""

import json
from pathlib import Path
from typing import Any

from minipaged.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a file holds. Raises CheckpointError."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:  # neither JSON nor, perhaps, text
        raise CheckpointError(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} is JSON but no object: download it again.")
    return parsed
