"""Where a model is on this machine: embedded, in a folder, or fetched before."""

from importlib.resources import files
from pathlib import Path

from minipaged.errors import CheckpointError, FetchError
from minipaged.models.hub.catalogue import find_known, in_words
from minipaged.models.hub.local_models import ModelName, find_local

EMBEDDED = ("storyteller",)  # models that ship inside the package


def find_model(model: str | Path) -> Path:
    """The folder of a model: of an embedded one, of a path, or of a name that was fetched before.

    Raises CheckpointError if there is none; nothing is ever downloaded from here.
    """
    if model in EMBEDDED:
        return Path(str(files("minipaged") / "assets" / str(model)))
    if model and Path(model).is_dir():
        return Path(model)
    fetched = find_local(model) if isinstance(model, str) else None
    if fetched is None:
        raise CheckpointError(_how_to_get(str(model)))
    return fetched


def _how_to_get(model: str) -> str:
    try:
        name = ModelName.parse(model)
    except FetchError as error:
        embedded = " or ".join(EMBEDDED)
        return f"there is no folder {model!r}, the embedded model is {embedded}, and {error}"
    known = find_known(name.repo)
    if known is None:
        return (
            f"{model!r} is neither a folder nor a model that was fetched: correct the path, or "
            f"fetch it by `minipaged fetch {model}`."
        )
    size = f"about {in_words(known.num_bytes)}, licence: {known.licence}"
    return f"{name} is not on this machine: fetch it ({size}) by `minipaged fetch {model}`."
