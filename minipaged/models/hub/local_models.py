"""Finds the folder of a model on this machine, without downloading.

A model is embedded in the package, a path, or a name on the hub. Names are looked up in minipaged's
own folder, where `minipaged fetch` stores complete models, and in the cache that Hugging Face's
libraries share.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from minipaged.errors import CheckpointError, FetchError, InvalidOption
from minipaged.models.hub.catalogue import KNOWN_MODELS, find_known, in_words
from minipaged.utils.options import shown

EMBEDDED = ("storyteller",)  # models that ship inside the package

# Fetched along with the weights; text prompts need one of them.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")

_PAGE = re.compile(r"https?://(www\.)?(huggingface\.co|hf\.co)/")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")


@dataclass(frozen=True)
class ModelName:
    """A model on the hub: `owner/name` and a revision; None: the default revision."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> "ModelName":
        """Parse "owner/name", "owner/name@revision", or a listed model's name without its owner.

        The address of its page is also accepted. "main" is the default revision.

        Raises:
            FetchError: it is none of these. A name becomes part of a path, so the check is strict.
        """
        name = _PAGE.sub("", text.strip()).rstrip("/")
        repo, _, in_text = name.partition("@")
        if in_text and revision not in (None, in_text):
            raise FetchError(
                f"{text!r} and revision {revision} name two revisions: give one of them."
            )
        known = find_known(repo)
        repo, revision = known.name if known else repo, revision or in_text or None
        if revision == "main":
            revision = None  # otherwise one model would have two folders
        # The hub allows neither in a name; "--" also replaces "/" in the folder's name.
        if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
            raise FetchError(_no_name(repo))
        if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise FetchError(
                f"{revision!r} is not a revision: give the name of a branch or tag, or a commit."
            )
        return cls(repo, revision)

    @property
    def folder_name(self) -> str:
        """`owner--name`, or `owner--name@revision`, in characters valid on every file system."""
        at = "" if self.revision is None else "@" + quote(self.revision, safe="")
        return self.repo.replace("/", "--") + at

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_model_name(text: str) -> bool:
    """Whether the text could be a model's name on the hub."""
    try:
        ModelName.parse(text)
    except FetchError:
        return False
    return True


def _no_name(text: str) -> str:
    close = get_close_matches(text.lower(), [m.short_name.lower() for m in KNOWN_MODELS], n=1)
    known = find_known(close[0]) if close else None
    meant = f", perhaps {known.name}" if known else ""
    return (
        f"{shown(text)} is not a model name: give owner/name as on the hub, or a listed one{meant}."
    )


def find_model(
    model: str | Path, revision: str | None = None, cache: str | Path | None = None
) -> Path:
    """Return the folder of an embedded model, of a path, or of a model that was fetched before.

    Args:
        revision: branch, tag or commit of a model by name; None and "main": the default revision.
        cache: a folder in the form of Hugging Face's cache, searched before all others.

    Raises:
        CheckpointError: this machine has no such model.
        InvalidOption: a revision was given for a path.
    """
    folder = _find_folder(model)
    if folder is not None:
        _refuse_revision_of_folder(model, revision)
        return folder
    try:
        name = ModelName.parse(str(model), revision)
    except FetchError as error:
        raise CheckpointError(_no_model(str(model), error)) from error
    folder = find_local(name, cache) if isinstance(model, str) else None
    if folder is None:
        raise CheckpointError(_how_to_get(str(model), name))
    return folder


def _refuse_revision_of_folder(model: str | Path, revision: str | None) -> None:
    if revision not in (None, "main"):
        raise InvalidOption(
            f"revision is {shown(revision)}, but {shown(str(model))} is a folder, which has one "
            "revision: leave it out.",
            "revision",
        )


def _find_folder(model: str | Path) -> Path | None:
    if model in EMBEDDED:
        return Path(str(files("minipaged") / "assets" / str(model)))
    with suppress(OSError, ValueError):  # too long for a path, or with a null byte
        if model and Path(model).is_dir():
            return Path(model)
    return None


def _no_model(model: str, error: FetchError) -> str:
    if is_model_name(model):  # with a wrong revision
        return str(error)
    embedded = " or ".join(EMBEDDED)
    return f"there is no folder {shown(model)}, the only embedded model is {embedded}, and {error}"


def _how_to_get(model: str, name: ModelName) -> str:
    model = model if name.revision is None else str(name)
    known = find_known(name.repo)
    if known is None:
        return (
            f"{shown(model)} is neither a folder nor a model that was fetched: correct the path, "
            f"or fetch it by `minipaged fetch {model}`."
        )
    size = f"about {in_words(known.num_bytes)}, licence: {known.licence}"
    return f"{name} is not on this machine: fetch it ({size}) by `minipaged fetch {model}`."


# ----------------------------------------------------------------------------------- our own folder


def models_folder() -> Path:
    """Return $MINIPAGED_HOME/models, or minipaged/models in the user's cache folder."""
    home = os.environ.get("MINIPAGED_HOME")
    return Path(home).expanduser() / "models" if home else _user_cache() / "minipaged" / "models"


def folder_of(name: str | ModelName) -> Path:
    """The folder where `minipaged fetch` stores this model. Raises FetchError for a wrong name."""
    model = ModelName.parse(name) if isinstance(name, str) else name
    return models_folder() / model.folder_name


def find_local(name: str | ModelName, cache: str | Path | None = None) -> Path | None:
    """The folder of this complete model; None if there is none, or if it is not a model name.

    Accepts the input of `ModelName.parse` or its result, and a cache to search first. Uses no
    network.
    """
    if isinstance(name, str):
        if not is_model_name(name):
            return None
        name = ModelName.parse(name)
    # Our own folder is complete if it exists: a rename gives it its name after all checks.
    try:
        found = _find_in_hub_cache(name, Path(cache)) if cache else None
        if found is not None:
            return found
        own = folder_of(name)
        return own if own.is_dir() else _find_in_hub_cache(name, _hub_cache())
    except (OSError, ValueError, RuntimeError):
        return None  # name too long, reference not text, no such home folder


# ---------------------------------------------------------------------------- Hugging Face's cache
# models--owner--name/refs/main           the last known commit of "main"
# models--owner--name/snapshots/<commit>/ the files of that commit that were downloaded


def _find_in_hub_cache(model: ModelName, cache: Path) -> Path | None:
    known = find_known(model.repo)
    repos = [model.repo, known.short_name] if known else [model.repo]  # older caches use "gpt2"
    for repo in repos:
        folder = cache / f"models--{repo.replace('/', '--')}"
        revision = model.revision or "main"
        reference = folder / "refs" / revision
        commit = reference.read_text().strip() if reference.is_file() else revision
        snapshot = folder / "snapshots" / commit
        if _is_whole(snapshot):
            return snapshot
    return None


def _hub_cache() -> Path:
    """The folder that `huggingface_hub` uses; read each time, as the environment may change."""
    cache, home = os.environ.get("HF_HUB_CACHE"), os.environ.get("HF_HOME")
    if cache:
        return Path(cache).expanduser()
    return (Path(home).expanduser() if home else _user_cache() / "huggingface") / "hub"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _is_whole(snapshot: Path) -> bool:
    """Whether config, a tokenizer and all weights are there: a cache may have only some files."""
    if not (snapshot / "config.json").is_file():
        return False
    if not any((snapshot / name).is_file() for name in TOKENIZER_FILES):
        return False
    if (snapshot / "model.safetensors").is_file():
        return True
    try:
        index: Any = json.loads((snapshot / "model.safetensors.index.json").read_text("utf-8"))
        return all((snapshot / shard).is_file() for shard in set(index["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # no index, or a broken one
