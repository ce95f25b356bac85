"""The Hugging Face hub: lists the files of a model, and downloads one file.

All network access is in this module. It uses `huggingface_hub`, which is imported only when a
function needs it.
"""

import json
import os
import re
import time
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

from minipaged.errors import FetchError
from minipaged.models.hub.failures import BrokenOff, failures_explained, without_password
from minipaged.models.hub.local_models import TOKENIZER_FILES, ModelName

if TYPE_CHECKING:
    from tqdm import tqdm

PUBLIC_HUB = "https://huggingface.co"
CONFIG = "config.json"
BESIDE_THE_WEIGHTS = (
    CONFIG,
    *TOKENIZER_FILES,
    *"generation_config.json tokenizer_config.json special_tokens_map.json".split(),
    *"added_tokens.json merges.txt chat_template.jinja".split(),
)
# In order of preference. A pickled checkpoint (.bin) is converted after the download.
SAFE_WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_PICKLED = (".bin", f"{PICKLED_WEIGHTS}.index.json")
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,180}\.(safetensors|bin)")
_CHECKSUM = re.compile(r"[0-9a-f]{40,64}")  # its first characters become part of a file name

PIECE_BYTES = 256 * 1024  # bytes per write: at most this is lost when a connection breaks
NUM_TRIES = 5  # consecutive attempts without data before a transfer fails


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub."""

    name: str
    num_bytes: int
    checksum: str  # "sha256:..." of large files, "git:..." of small ones


@dataclass(frozen=True)
class Offer:
    """A model on the hub: one commit, and the files of it that a checkpoint needs."""

    model: ModelName
    repo: str  # the hub's current name: differs from the requested one if the model was renamed
    commit: str  # every file is requested by commit, so that all belong together
    files: tuple[RemoteFile, ...]  # config.json first
    licence: str | None
    endpoint: str = field(repr=False)  # may contain a password

    @property
    def hub(self) -> str:
        """The endpoint without its password, for printing and logging."""
        return without_password(self.endpoint)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.num_bytes for file in self.files)

    @property
    def pickled(self) -> tuple[RemoteFile, ...]:
        """Weights that must be converted, with their index; may be empty."""
        return tuple(file for file in self.files if file.name.endswith(_PICKLED))


def ask_hub(name: str | ModelName, revision: str | None = None) -> Offer:
    """List the files of a fetch and their sizes; no weights are downloaded.

    Honours HF_ENDPOINT, HF_TOKEN (or the token of `hf auth login`) and HF_HUB_OFFLINE.

    Raises:
        FetchError: no such model or revision, no access to it, no weights in it, or no network.
    """
    model = ModelName.parse(name, revision) if isinstance(name, str) else name
    endpoint = _endpoint()
    info = _describe(model, endpoint, model.repo)
    # The redirect of a renamed model may drop the request for sizes and checksums.
    if info.id != model.repo and info.siblings and all(s.size is None for s in info.siblings):
        info = _describe(model, endpoint, info.id)
    licences = [tag for tag in info.tags or [] if tag.startswith("license:")]
    listed = Offer(
        model=model,
        repo=info.id,
        commit=str(info.sha),
        files=_list_files(info, model, without_password(endpoint)),
        licence=licences[0].partition(":")[2] if licences else None,
        endpoint=endpoint,
    )
    return _choose_files(listed)


def _endpoint() -> str:
    given = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or PUBLIC_HUB
    if not re.match("https?://", given):
        raise FetchError(f"HF_ENDPOINT is {without_password(given)!r}: begin it with https://.")
    return given


def _describe(model: ModelName, endpoint: str, repo: str) -> Any:
    hub = without_password(endpoint)
    with failures_explained(model, hub, f"{hub} could not be reached"):
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

        # The endpoint is passed explicitly: the library reads HF_ENDPOINT only when imported.
        return HfApi(endpoint=endpoint).model_info(
            repo, revision=model.revision, files_metadata=True, timeout=HF_HUB_DOWNLOAD_TIMEOUT
        )


# ---------------------------------------------------------------------------------------- bytes


def receive(offer: Offer, file: RemoteFile, into: BinaryIO, bar: "tqdm[Any] | None" = None) -> None:
    """Append the missing bytes of this file to `into`. Only the length is checked.

    A broken transfer is resumed as long as attempts bring more bytes.

    Raises:
        FetchError: the transfer failed. The bytes received so far are written.
        OSError: for example, the disk is full.
    """
    broken = f"the transfer of {file.name} from {offer.hub} broke off"
    tries_left = NUM_TRIES
    while True:
        before = into.tell()
        try:
            with failures_explained(offer.model, offer.hub, broken):
                return _receive_rest(offer, file, into, bar)
        except BrokenOff as error:
            tries_left = NUM_TRIES if into.tell() > before else tries_left - 1
            if tries_left == 0:
                raise
            time.sleep(error.wait)


def _receive_rest(
    offer: Offer, file: RemoteFile, into: BinaryIO, bar: "tqdm[Any] | None" = None
) -> None:
    """Send one request, and append the bytes of the response."""
    # The library's own downloads write in pieces of 10 MB, so a broken connection loses up to 10 MB
    # or all bytes, and they wait silently for hours if the hub asks them to.
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    start = into.tell()
    if start == file.num_bytes:
        return
    url = hf_hub_url(offer.repo, file.name, revision=offer.commit, endpoint=offer.endpoint)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # compressed: cannot be resumed
    if start > 0:
        headers["Range"] = f"bytes={start}-"
    ask = get_session().stream("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
    with ask as response:
        hf_raise_for_status(response)
        if response.status_code not in (200, 206):
            raise ValueError(f"status {response.status_code} for {file.name}")
        skip = start if response.status_code == 200 else 0  # the server sends the whole file
        for piece in response.iter_bytes(PIECE_BYTES):
            new = piece[skip:]
            skip = max(0, skip - len(piece))
            into.write(new)
            if bar is not None:
                bar.update(len(new))
            if into.tell() > file.num_bytes:
                return  # too long: the checksum will be wrong
    if into.tell() < file.num_bytes:
        raise EOFError(f"{into.tell()} of {file.num_bytes} bytes came")


# --------------------------------------------------------------------------------- which files


def _list_files(info: Any, model: ModelName, hub: str) -> tuple[RemoteFile, ...]:
    siblings = info.siblings or []
    sums = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in siblings}
    known = [
        s for s in siblings if s.size is not None and _CHECKSUM.fullmatch(sums[s.rfilename] or "")
    ]
    if siblings and not known:
        raise FetchError(
            f"{hub} provides no sizes and checksums of {model}, so nothing could be "
            "checked: set HF_ENDPOINT to another hub, or unset it."
        )
    kinds = [("sha256:" if s.lfs else "git:") + sums[s.rfilename] for s in known]
    return tuple(RemoteFile(s.rfilename, s.size, c) for s, c in zip(known, kinds, strict=True))


def _choose_files(listed: Offer) -> Offer:
    """Select from all files of the repository: config, tokenizer and one format of the weights."""
    by_name = {file.name: file for file in listed.files}
    if CONFIG not in by_name:
        raise FetchError(
            f"{listed.model} contains no config.json, so it is not a transformer's checkpoint: "
            "choose another model."
        )
    weights = _choose_weights(listed, by_name)
    missing = [name for name in weights if name not in by_name]
    if missing:
        raise FetchError(
            f"{listed.model} lacks {len(missing)} of the files that its index of weights lists, "
            f"first {missing[0]}: choose another revision or model."
        )
    names = [name for name in BESIDE_THE_WEIGHTS if name in by_name] + weights
    return replace(listed, files=tuple(by_name[name] for name in names))


def _choose_weights(listed: Offer, by_name: dict[str, RemoteFile]) -> list[str]:
    """The names of the weights: one file, or an index and the shards that it lists."""
    for single in (SAFE_WEIGHTS, PICKLED_WEIGHTS):
        if single in by_name:
            return [single]
        index = f"{single}.index.json"
        if index in by_name:
            return [index, *_read_shard_names(listed, by_name[index])]
    other = [n for n in by_name if n.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".pth"))]
    seen = f" ({other[0]} is not read here)" if other else ""
    raise FetchError(
        f"{listed.model} contains neither {SAFE_WEIGHTS} nor {PICKLED_WEIGHTS}{seen}: choose "
        "another repository of this model."
    )


def _read_shard_names(listed: Offer, index: RemoteFile) -> list[str]:
    content = BytesIO()
    receive(listed, index, content)
    try:
        names = sorted(set(json.loads(content.getvalue())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        names = []
    # They become paths, so they must be plain file names, of the same format as the index.
    suffix = ".safetensors" if index.name.startswith(SAFE_WEIGHTS) else ".bin"
    if not names or not all(
        isinstance(n, str) and SHARD.fullmatch(n) and n.endswith(suffix) for n in names
    ):
        raise FetchError(
            f"{index.name} of {listed.model} does not list valid names of shards: choose another "
            "revision or model."
        )
    return names
