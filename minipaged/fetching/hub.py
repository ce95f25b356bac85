"""The Hugging Face hub: what it offers under a name, and the bytes of one file.

All talk with the network is here, and all its ways to fail end as one sentence each. It goes
through `huggingface_hub`, which is imported only when a function needs it.
"""

import errno
import json
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

from minipaged.errors import FetchError, MinipagedError
from minipaged.fetching.local_models import TOKENIZER_FILES, ModelName

if TYPE_CHECKING:
    from tqdm import tqdm

PUBLIC_HUB = "https://huggingface.co"
CONFIG = "config.json"
_BESIDE_THE_WEIGHTS = (
    CONFIG,
    *TOKENIZER_FILES,
    *"generation_config.json tokenizer_config.json special_tokens_map.json".split(),
    *"added_tokens.json merges.txt chat_template.jinja".split(),
)
# In the order of preference. A pickled checkpoint (.bin) is converted once it is here.
SAFE_WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|bin)")
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub."""

    name: str
    num_bytes: int
    checksum: str  # "sha256:..." of large files, "git:..." of small ones


@dataclass(frozen=True)
class Offer:
    """What the hub has under a name: one commit, and those of its files that a checkpoint needs."""

    model: ModelName
    repo: str  # as the hub writes it now: another than was asked for, when it was renamed
    commit: str  # every file is asked for by it, so that all are of one time
    files: tuple[RemoteFile, ...]  # config.json first
    licence: str | None
    endpoint: str

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(file.num_bytes for file in self.files)

    @property
    def pickled(self) -> tuple[RemoteFile, ...]:
        """Weights that must be converted, with their index; empty if none must."""
        return tuple(file for file in self.files if file.name.startswith("pytorch_model"))


def ask_hub(name: str | ModelName, revision: str | None = None) -> Offer:
    """Ask what a fetch would bring, and how much it is; no weights are downloaded.

    Honours HF_ENDPOINT, HF_TOKEN (or the token that `hf auth login` left) and HF_HUB_OFFLINE.

    Raises:
        FetchError: no such model or revision, no right to it, no weights in it, no network.
    """
    model = ModelName.parse(name, revision) if isinstance(name, str) else name
    endpoint = os.environ.get("HF_ENDPOINT", PUBLIC_HUB).rstrip("/") or PUBLIC_HUB
    with _failures_explained(model, endpoint, f"{endpoint} could not be reached"):
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

        # The endpoint is passed on everywhere: the library reads HF_ENDPOINT only when imported.
        info = HfApi(endpoint=endpoint).model_info(
            model.repo,
            revision=model.revision,
            files_metadata=True,
            timeout=HF_HUB_DOWNLOAD_TIMEOUT,
        )
    licences = [tag for tag in info.tags or [] if tag.startswith("license:")]
    listed = Offer(
        model=model,
        repo=info.id,
        commit=str(info.sha),
        files=_list_files(info, model, endpoint),
        licence=licences[0].partition(":")[2] if licences else None,
        endpoint=endpoint,
    )
    return _choose_files(listed)


def receive(offer: Offer, file: RemoteFile, into: BinaryIO, bar: "tqdm[Any] | None" = None) -> None:
    """Append to `into` what it still lacks of this file. Nothing is checked but the length.

    Raises:
        FetchError: the transfer broke off. What came until then is written.
        OSError: the disk is full.
    """
    broken = f"the transfer of {file.name} from {offer.endpoint} broke off"
    with _failures_explained(offer.model, offer.endpoint, broken):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        # Not hf_hub_download, of which this is the core: from release 1.18 on, that throws away
        # what came before a transfer broke off. A compressed body could not be resumed either.
        url = hf_hub_url(offer.repo, file.name, revision=offer.commit, endpoint=offer.endpoint)
        http_get(
            url,
            into,
            resume_size=into.tell(),
            headers=build_hf_headers() | {"Accept-Encoding": "identity"},
            expected_size=file.num_bytes,
            displayed_filename=file.name,
            _tqdm_bar=bar,
        )


# --------------------------------------------------------------------------------- which files


def _list_files(info: Any, model: ModelName, endpoint: str) -> tuple[RemoteFile, ...]:
    siblings = info.siblings or []
    known = [s for s in siblings if s.size is not None and (s.lfs or s.blob_id)]
    if siblings and not known:
        raise FetchError(
            f"{endpoint} tells no sizes and checksums of {model}, so that nothing could be "
            "checked: set HF_ENDPOINT to another hub, or unset it."
        )
    checksums = [f"sha256:{s.lfs.sha256}" if s.lfs else f"git:{s.blob_id}" for s in known]
    return tuple(RemoteFile(s.rfilename, s.size, c) for s, c in zip(known, checksums, strict=True))


def _choose_files(listed: Offer) -> Offer:
    """Of all that lies in the repository: config, tokenizer and one form of the weights."""
    by_name = {file.name: file for file in listed.files}
    if CONFIG not in by_name:
        raise FetchError(
            f"{listed.model} holds no config.json, so it is no checkpoint of a transformer: choose "
            "another model."
        )
    weights = _choose_weights(listed, by_name)
    missing = [name for name in weights if name not in by_name]
    if missing:
        raise FetchError(
            f"{listed.model} lacks {len(missing)} of the files that its index of weights names, "
            f"first {missing[0]}: choose another revision or model."
        )
    names = [name for name in _BESIDE_THE_WEIGHTS if name in by_name] + weights
    return replace(listed, files=tuple(by_name[name] for name in names))


def _choose_weights(listed: Offer, by_name: dict[str, RemoteFile]) -> list[str]:
    """The names of the weights: one file, or an index and the shards that it names."""
    for single in (SAFE_WEIGHTS, PICKLED_WEIGHTS):
        if single in by_name:
            return [single]
        index = f"{single}.index.json"
        if index in by_name:
            return [index, *_read_shard_names(listed, by_name[index])]
    other = [n for n in by_name if n.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".pth"))]
    seen = f" ({other[0]} is not read here)" if other else ""
    raise FetchError(
        f"{listed.model} holds neither {SAFE_WEIGHTS} nor {PICKLED_WEIGHTS}{seen}: choose another "
        "repository of this model."
    )


def _read_shard_names(listed: Offer, index: RemoteFile) -> list[str]:
    content = BytesIO()
    receive(listed, index, content)
    try:
        names = sorted(set(json.loads(content.getvalue())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        names = []
    # They become paths here, so they must be mere names.
    if not names or not all(isinstance(n, str) and _SHARD.fullmatch(n) for n in names):
        raise FetchError(
            f"{index.name} of {listed.model} does not name its shards as it should: choose another "
            "revision or model."
        )
    return names


# ------------------------------------------------------------------------------------- failures


@contextmanager
def _failures_explained(
    model: ModelName, endpoint: str, no_answer: str
) -> Generator[None, None, None]:
    """Turn whatever the library raises into a FetchError, and keep its own warnings quiet."""
    try:
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise FetchError(
            "models are fetched by huggingface_hub, which is not installed: "
            "pip install huggingface_hub."
        ) from error
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise FetchError(f"HF_HUB_OFFLINE is set: unset it to fetch {model}.")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every retry, and of every request without a token
    try:
        yield
    except MinipagedError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            raise  # a matter of this machine
        what = _explain(error, model, endpoint)
        raise FetchError(what or f"{no_answer} ({_reason(error)}): check the network.") from error
    finally:
        logging.set_verbosity(verbosity)


def _explain(error: Exception, model: ModelName, endpoint: str) -> str | None:
    """What the hub's answer means; None: there was no answer, or not the whole of it."""
    from huggingface_hub import errors

    # Gated is a kind of not found, and every answer has a status: from the narrow to the wide.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{model} is given only to those who accepted its licence: accept it at "
            f"{endpoint}/{model.repo}, and set HF_TOKEN to a token of your account."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model.repo} has no revision {model.revision!r} at {endpoint}: check its name."
    if isinstance(error, errors.EntryNotFoundError):
        return f"a file of {model} is gone from {endpoint} since it was listed: fetch again."
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return (
            f"there is no model {model.repo} at {endpoint}, or it is private: check the name, and "
            "for a private one set HF_TOKEN."
        )
    if status == 401:
        return f"{endpoint} refuses the token: set HF_TOKEN to a valid one, or unset it."
    if status == 403:
        return f"{endpoint} forbids access to {model} (status 403): use another token in HF_TOKEN."
    if status is not None:
        return f"{endpoint} answered {model} with status {status}: try again later."
    if isinstance(error, ValueError | LookupError | TypeError):
        return f"{endpoint} does not answer as a hub does ({_reason(error)}): check HF_ENDPOINT."
    return None


def _reason(error: Exception) -> str:
    """The first line of what the error says, or its kind, if it says nothing."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip(" .:")[:200] if lines else "") or type(error).__name__
