"""From a name to a folder, against a hub on this machine that fails in every way hubs fail."""

import errno
import io
import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from checkpoints import make_checkpoint
from filelock import FileLock
from hub import Hub, Request, running
from safetensors.torch import load_file

from minipaged import LLM, SamplingParams
from minipaged.cli.fetch import fetch_and_report, offer_to_fetch, print_known_models
from minipaged.errors import CheckpointError, FetchError, MinipagedError, UnsupportedModel
from minipaged.models.hub import fetch as fetch_module
from minipaged.models.hub import hub as hub_module
from minipaged.models.hub.catalogue import KNOWN_MODELS, find_known, in_words
from minipaged.models.hub.fetch import download, fetch, find_here
from minipaged.models.hub.hub import ask_hub, receive
from minipaged.models.hub.local_models import ModelName, find_local, folder_of, models_folder

PIECE_BYTES = hub_module.PIECE_BYTES  # before the tests make it smaller
NAME = "someone/small-llama"
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _in_a_home_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the models, the tokens or the endpoint of the person who runs it."""
    monkeypatch.setenv("MINIPAGED_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # What is received is written in pieces of this size; a broken connection loses one of them.
    monkeypatch.setattr(hub_module, "PIECE_BYTES", 4096)
    # Nor does any wait, before it tries again.
    monkeypatch.setattr(hub_module, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, llama: Path) -> Iterator[Hub]:
    with running(Hub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add(NAME, llama)
        yield hub


def refusal(name: str = NAME, **options: Any) -> str:
    """The one sentence with which a fetch ends."""
    with pytest.raises(MinipagedError) as refused:
        fetch(name, **options)
    sentence = str(refused.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert ": " in sentence, "an error says what is wrong, a colon, and what to change"
    return sentence


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def beside(target: Path, what: str) -> Path:
    """Where a fetch has its files, or its lock, until it has finished."""
    return target.parent / f".{target.name}.minipaged-{what}"


def size_of(hub: Hub) -> str:
    return in_words(sum(map(len, hub.repos[NAME].files.values())))


def tokens(folder: Path) -> list[int]:
    llm = LLM(folder, num_blocks=8)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    [output] = llm.generate([[5, 17, 42]], greedy, use_tqdm=False)
    return list(output.outputs[0].token_ids)


# ------------------------------------------------------------------------------------------- whole


def test_a_fetched_model_generates_what_the_published_one_does(hub: Hub, llama: Path) -> None:
    folder = fetch(NAME)
    assert folder == folder_of(NAME) == find_local(NAME)
    assert tokens(folder) == tokens(llama)


def test_nothing_but_the_model_and_its_source_is_left(hub: Hub, llama: Path) -> None:
    folder = fetch(NAME)
    source = json.loads((folder / "source.json").read_text())
    assert contents(folder).keys() == contents(llama).keys() | {"source.json"}
    assert all((folder / name).read_bytes() == c for name, c in contents(llama).items())
    assert left_in(models_folder()) == [folder.name]
    assert source["commit"] == hub.repos[NAME].commit
    assert (source["repo"], source["licence"], source["endpoint"]) == (NAME, "mit", hub.url)
    assert {file["name"] for file in source["files"]} == contents(llama).keys()


def test_a_downloaded_model_is_returned_without_a_request(hub: Hub) -> None:
    folder = fetch(NAME)
    hub.requests.clear()
    assert fetch(NAME) == folder
    assert not hub.requests


def test_every_file_is_asked_for_by_the_commit_that_the_hub_named(hub: Hub) -> None:
    fetch(NAME)
    commit = hub.repos[NAME].commit
    paths = [r.path for r in hub.requests if r.file is not None and "/storage/" not in r.path]
    assert paths
    assert all(f"/resolve/{commit}/" in path for path in paths)


def test_only_the_files_of_one_checkpoint_are_downloaded(hub: Hub, llama: Path) -> None:
    repo = hub.repos[NAME]
    beside = "tokenizer.json tokenizer_config.json vocab.json merges.txt tokenizer.model".split()
    repo.files |= dict.fromkeys(beside, b"{}")
    others = "README.md pytorch_model.bin flax_model.msgpack tf_model.h5 consolidated.00.pth"
    repo.files |= dict.fromkeys(others.split(), b"another form")
    repo.files["onnx/model.onnx"] = b"another form"
    offer = ask_hub(NAME)
    assert {file.name for file in offer.files} == contents(llama).keys() | set(beside)
    assert offer.num_bytes == sum(len(repo.files[file.name]) for file in offer.files)
    assert not [request for request in hub.requests if request.file == WEIGHTS]


def test_the_shards_that_the_index_lists_are_downloaded(
    hub: Hub, llama: Path, tmp_path: Path
) -> None:
    sharded = make_checkpoint("llama", tmp_path / "sharded", max_shard_size="40KB")
    repo = hub.add("someone/sharded", sharded)
    repo.files["model-00009-of-00009.safetensors"] = b"of an older version"
    folder = fetch("someone/sharded")
    assert left_in(folder) == sorted([*left_in(sharded), "source.json"])
    assert tokens(folder) == tokens(llama)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_converted_and_not_kept(shards: int, hub: Hub, tmp_path: Path) -> None:
    original = make_checkpoint("opt", tmp_path / "opt", dtype=torch.float16)
    published = pickle_weights(original, tmp_path / "pickled", shards)
    hub.add("someone/opt", published)
    folder = fetch("someone/opt")
    assert not list(folder.glob("*.bin*"))
    assert len(list(folder.glob("model*.safetensors"))) == shards
    assert tokens(folder) == tokens(original)


def pickle_weights(original: Path, folder: Path, shards: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = sorted(load_file(original / WEIGHTS).items())
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    if shards == 1:
        names = ["pytorch_model.bin"]
    for i, name in enumerate(names):
        torch.save(dict(tensors[i::shards]), folder / name)
    if shards > 1:
        weight_map = {key: names[i % shards] for i, (key, _) in enumerate(tensors)}
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
        MemoryError(),
        OSError(errno.EIO, "Input/output error"),
    ],
    ids=["allocator", "mmap", "python", "disk"],
)
def test_a_machine_that_fails_to_convert_keeps_what_was_downloaded(
    failure: Exception, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_checkpoint("opt", tmp_path / "opt")
    hub.add("someone/opt", pickle_weights(original, tmp_path / "pickled", 1))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(failure))
        with pytest.raises(OSError, match=r"memory|Input/output error") as refused:
            fetch("someone/opt")
    assert refused.value.filename.endswith("pytorch_model.bin")
    hub.requests.clear()
    assert tokens(fetch("someone/opt")) == tokens(original)
    assert not [request for request in hub.requests if request.file]


def test_a_pickle_that_was_published_broken_is_not_called_a_bad_download(
    hub: Hub, tmp_path: Path
) -> None:
    original = make_checkpoint("opt", tmp_path / "opt")
    repo = hub.add("someone/opt", pickle_weights(original, tmp_path / "pickled", 1))
    repo.files["pytorch_model.bin"] = repo.files["pytorch_model.bin"][:-500]
    sentence = refusal("someone/opt")
    assert "pytorch_model.bin of someone/opt has the right checksum, but" in sentence
    assert "are kept" in sentence


def test_a_machine_that_fails_to_read_what_it_wrote_keeps_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def unreadable(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "config.json":
            raise OSError(errno.EIO, "Input/output error")
        return read(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", unreadable)
        with pytest.raises(CheckpointError, match="cannot be read"):
            fetch(NAME)
    fetch(NAME)
    assert len(hub.asked_for("config.json")) == 1


@pytest.mark.parametrize("shards", [1, 2])
def test_a_fetch_that_is_killed_before_the_rename_loses_nothing(
    shards: int, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_checkpoint("opt", tmp_path / "opt")
    hub.add("someone/opt", pickle_weights(original, tmp_path / "pickled", shards))
    rename = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.is_dir():
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch("someone/opt")
    hub.requests.clear()
    folder = fetch("someone/opt")
    assert not [r for r in hub.requests if r.file and r.file.endswith(".bin")]
    assert not list(folder.glob("*.bin*"))
    assert tokens(folder) == tokens(original)


def test_a_pickle_that_would_run_code_is_refused_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    original = make_checkpoint("opt", tmp_path / "opt")
    hub.add("someone/evil", pickle_weights(original, tmp_path / "evil", 1))
    content = io.BytesIO()
    torch.save({"a": Touch(tmp_path / "it-ran")}, content)
    hub.repos["someone/evil"].files["pytorch_model.bin"] = content.getvalue()
    assert "could run code" in refusal("someone/evil")
    assert not (tmp_path / "it-ran").exists()
    assert left_in(models_folder()) == []


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


# -------------------------------------------------------------------------------- names and places


def test_a_listed_model_is_found_by_its_short_name(hub: Hub, llama: Path) -> None:
    hub.add("openai-community/gpt2", llama)
    assert fetch("gpt2") == fetch("openai-community/gpt2") == fetch("GPT2")
    assert left_in(models_folder()) == ["openai-community--gpt2"]


def test_a_renamed_model_is_fetched_under_the_name_asked_for(hub: Hub) -> None:
    hub.renamed["someone/old-name"] = NAME
    folder = fetch("someone/old-name")
    assert folder.name == "someone--old-name"
    assert json.loads((folder / "source.json").read_text())["repo"] == NAME


def test_a_redirect_that_drops_the_query_costs_one_more_request(hub: Hub) -> None:
    hub.renamed["someone/old-name"], hub.forgets_queries = NAME, True
    assert fetch("someone/old-name").name == "someone--old-name"


def test_a_revision_has_a_folder_of_its_own(hub: Hub) -> None:
    hub.repos[NAME].revisions = ("main", "refs/pr/1")
    folder = fetch(NAME, revision="refs/pr/1")
    assert folder.name == "someone--small-llama@refs%2Fpr%2F1"
    assert fetch(f"{NAME}@refs/pr/1") == folder == find_local(f"{NAME}@refs/pr/1")
    assert find_local(NAME) is None
    assert "/revision/refs%2Fpr%2F1?" in hub.requests[0].path


def test_a_chosen_directory_is_recognised_again(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "mine" / "llama"
    target.mkdir(parents=True)
    assert fetch(NAME, directory=target) == target
    hub.requests.clear()
    assert fetch(NAME, directory=str(target)) == target
    assert not hub.requests
    assert left_in(target.parent) == ["llama"]
    assert left_in(models_folder()) == []


@pytest.mark.parametrize("content", ["notes", "another model"])
def test_a_directory_with_other_content_is_not_changed(
    content: str, hub: Hub, llama: Path, tmp_path: Path
) -> None:
    if content == "notes":
        (tmp_path / "notes.txt").write_text("mine")
    else:
        hub.add("someone/else", llama)
        fetch("someone/else", directory=tmp_path / "else")
    target = tmp_path if content == "notes" else tmp_path / "else"
    before = left_in(target)
    assert f"{target} is not empty and contains no {NAME}" in refusal(directory=target)
    assert left_in(target) == before


def test_files_that_only_resemble_a_fetch_belong_to_the_user(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "poetry.lock").write_text("mine")
    (tmp_path / "poetry.partial").mkdir()
    (tmp_path / "poetry.partial" / "thesis.txt").write_text("mine")
    fetch(NAME, directory=tmp_path / "poetry")
    assert (tmp_path / "poetry.lock").read_text() == "mine"
    assert (tmp_path / "poetry.partial" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["file", "link", "notes", "folder", "link within", "lock"])
def test_files_that_no_fetch_can_have_left_are_refused_and_kept(
    what: str, hub: Hub, tmp_path: Path
) -> None:
    staging = beside(tmp_path / "llama", "lock" if what == "lock" else "partial")
    mine = tmp_path / "mine"
    mine.mkdir()
    if what == "file":
        staging.write_text("mine")
    elif what in ("link", "lock"):
        staging.symlink_to(mine)
    else:
        staging.mkdir()
        (staging / "config.json").write_text("left by a fetch")
    if what == "notes":
        (staging / "notes.txt").write_text("mine")
    elif what == "folder":
        (staging / "config.json.d").mkdir()
    elif what == "link within":
        (staging / WEIGHTS).symlink_to(mine)
    before = sorted(tmp_path.rglob("*"))
    sentence = refusal(directory=tmp_path / "llama")
    assert "is in the way, but is not from a fetch: move it elsewhere." in sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_leftovers_of_a_fetch_are_removed(hub: Hub, llama: Path) -> None:
    staging = beside(folder_of(NAME), "partial")
    (staging / ".minipaged-converting-abc").mkdir(parents=True)
    old = "pytorch_model.bin model-00001-of-00002.safetensors model.safetensors.index.json"
    for name in f"{old} merges.txt source.json {WEIGHTS}.0123456789abcdef.part".split():
        (staging / name).write_text("of an older version")
    folder = fetch(NAME)
    assert contents(folder).keys() == contents(llama).keys() | {"source.json"}


def test_a_partial_download_longer_than_its_file_is_discarded(hub: Hub, llama: Path) -> None:
    hub.cuts[WEIGHTS] = [50_000] + [0] * 9
    refusal()
    [beginning] = beside(folder_of(NAME), "partial").glob("*.part")
    beginning.write_bytes(bytes(1_000_000))
    assert contents(fetch(NAME))[WEIGHTS] == contents(llama)[WEIGHTS]


def test_a_link_to_an_empty_folder_is_followed(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert fetch(NAME, directory=tmp_path / "link") == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()


def test_an_irreplaceable_folder_is_reported_before_any_request(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    instead = f"give a folder within it, such as {folder / 'someone--small-llama'}"
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        sentence = refusal(directory=".")
        assert "is the current directory, which a fetch would have to replace" in sentence
        assert instead in sentence
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path == folder)
        sentence = refusal(directory=folder)
        assert "is a mount point, which a fetch would have to replace" in sentence
        assert instead in sentence
    assert not hub.requests


def test_an_unknown_home_folder_is_reported(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "~nobody-here/x is not a valid folder" in refusal(directory="~nobody-here/x")
    monkeypatch.setenv("MINIPAGED_HOME", "~nobody-here")
    assert "MINIPAGED_HOME is not a valid folder" in refusal()


@pytest.mark.parametrize(
    "name",
    [
        f"https://huggingface.co/{NAME}", f"http://www.hf.co/{NAME}/", f"{NAME}/", f" {NAME}\n",
        f"{NAME}@main", f"https://huggingface.co/{NAME}@main",
    ],
)  # fmt: skip
def test_one_model_has_one_name_in_every_spelling(name: str) -> None:
    assert ModelName.parse(name) == ModelName.parse(NAME, "main") == ModelName(NAME)


@pytest.mark.parametrize("name", [f"a/{'b' * 300}", f"a/b@{'c' * 300}", f"a/b@{'c/' * 3000}d"])
def test_a_name_too_long_for_a_file_is_not_a_local_model(name: str) -> None:
    assert find_local(name) is None


@pytest.mark.parametrize(
    "name",
    "gpt-9 ../up a/../b /etc/passwd a/b/c a\\b .. a/.hidden a/b--c a/b@../../up a/ -x/y".split(),
)
def test_an_invalid_name_never_becomes_a_path(name: str) -> None:
    assert "is not a model name" in refusal(name) or "is not a revision" in refusal(name)
    assert find_local(name) is None


def test_a_misspelt_name_is_answered_with_the_closest_one() -> None:
    assert "perhaps HuggingFaceTB/SmolLM2-135M-Instruct" in refusal("SmolLM2-135-Instruct")


def test_two_revisions_at_once_are_refused() -> None:
    assert "name two revisions" in refusal(f"{NAME}@one", revision="two")


def test_a_model_in_the_cache_of_hugging_face_is_used(
    tmp_path: Path, llama: Path, hub: Hub
) -> None:
    for repo, revision in ((NAME, "main"), ("gpt2", "v2")):
        folder = tmp_path / "hf" / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / revision).write_text("abc123")
        snapshot = folder / "snapshots" / "abc123"
        snapshot.mkdir(parents=True)
        for name, content in contents(llama).items():
            assert find_local(f"{repo}@{revision}") is None, "it is not whole yet"
            (snapshot / name).write_bytes(content)
        assert find_local(f"{repo}@{revision}") is None, "it has no tokenizer yet"
        (snapshot / "tokenizer.json").write_text("{}")
        assert fetch(repo, revision=revision) == find_local(f"{repo}@abc123") == snapshot
    assert find_local(NAME) is not None
    assert find_local("openai-community/gpt2@v2") == snapshot
    assert not hub.requests


def test_shards_in_a_cache_count_once_all_are_there(tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--a--b" / "snapshots" / "abc123"
    make_checkpoint("llama", snapshot, max_shard_size="40KB")
    (snapshot / "vocab.json").write_text("{}")
    assert find_local("a/b@abc123") == snapshot
    assert find_local("a/b") is None, "nothing says which commit main is"
    sorted(snapshot.glob("model-*.safetensors"))[1].unlink()
    assert find_local("a/b@abc123") is None


def test_every_listed_model_has_a_name_and_a_short_name_of_its_own() -> None:
    for model in KNOWN_MODELS:
        assert find_known(model.name) == find_known(model.short_name) == model
        assert ModelName.parse(model.name) == ModelName(model.name)
        # In two or four bytes a parameter, and Qwen3 stores a tied output matrix a second time.
        assert 1.9 < model.num_bytes / model.num_parameters < 4.6


def test_sizes_are_printed_for_people() -> None:
    sizes = [0, 999, 1_000, 99_400, 1_520_000, 999_600, 269_060_552, 13_300_000_000]
    said = ["0 bytes", "999 bytes", "1 kB", "99 kB", "1.5 MB", "1 MB", "269 MB", "13 GB"]
    assert [in_words(size) for size in sizes] == said


# ------------------------------------------------------------------------------ broken transfers


def ranges(requests: list[Request]) -> list[str | None]:
    return [request.range for request in requests]


def test_a_broken_download_resumes_where_it_stopped(hub: Hub, llama: Path) -> None:
    hub.cuts[WEIGHTS] = [50_000]
    folder = fetch(NAME)
    assert contents(folder)[WEIGHTS] == contents(llama)[WEIGHTS]
    assert ranges(hub.asked_for(WEIGHTS)) == [None, f"bytes={50_000 // 4096 * 4096}-"]


def test_the_download_library_prints_nothing(hub: Hub) -> None:
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append
    library = logging.getLogger("huggingface_hub")
    library.addHandler(listener)
    hub.cuts[WEIGHTS] = [50_000]
    fetch(NAME)
    library.removeHandler(listener)
    assert not said


def test_a_download_resumes_after_a_final_failure(hub: Hub, llama: Path) -> None:
    hub.cuts[WEIGHTS] = [50_000] + [0] * 9
    sentence = refusal()
    assert f"the transfer of {WEIGHTS} from {hub.url} broke off (" in sentence
    assert "are kept, and the same command resumes from there" in sentence
    assert find_local(NAME) is None
    hub.cuts.clear()
    hub.requests.clear()
    folder = fetch(NAME)
    assert ranges(hub.asked_for(WEIGHTS)) == [f"bytes={50_000 // 4096 * 4096}-"]
    assert not hub.asked_for("config.json")
    assert contents(folder)[WEIGHTS] == contents(llama)[WEIGHTS]
    assert left_in(models_folder()) == [folder.name]


def test_a_server_that_ignores_ranges_costs_time_only(hub: Hub, llama: Path) -> None:
    hub.cuts[WEIGHTS] = [50_000] + [0] * 9
    refusal()
    hub.cuts.clear()
    hub.ignores_ranges = True
    assert contents(fetch(NAME))[WEIGHTS] == contents(llama)[WEIGHTS]


def test_a_partial_download_of_another_version_is_discarded(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[WEIGHTS] = [50_000] + [0] * 9
    refusal()
    hub.cuts.clear()
    newer = make_checkpoint("llama", tmp_path / "newer", seed=1)
    hub.add(NAME, newer)
    hub.requests.clear()
    folder = fetch(NAME)
    assert ranges(hub.asked_for(WEIGHTS)) == [None]
    assert contents(folder)[WEIGHTS] == contents(newer)[WEIGHTS]
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_a_file_with_a_wrong_checksum_is_discarded_and_named(
    file: str, hub: Hub, llama: Path
) -> None:
    hub.corrupt = {file}
    assert f"{file} of {NAME} had a wrong checksum" in refusal()
    assert find_local(NAME) is None
    hub.corrupt = set()
    hub.requests.clear()
    assert contents(fetch(NAME))[file] == contents(llama)[file]
    assert ranges(hub.asked_for(file)) == [None], "the whole file once more, and no old part of it"


def test_a_kept_file_that_changed_on_the_disk_is_fetched_again(hub: Hub, llama: Path) -> None:
    hub.statuses[WEIGHTS] = 500
    refusal()
    staging = beside(folder_of(NAME), "partial")
    (staging / "config.json").write_bytes(b"x")
    hub.statuses.clear()
    assert contents(fetch(NAME))["config.json"] == contents(llama)["config.json"]


def test_two_processes_do_not_fetch_the_same_at_once(hub: Hub) -> None:
    target = folder_of(NAME)
    target.parent.mkdir(parents=True)
    with FileLock(beside(target, "lock")):
        assert f"another process is fetching {NAME}" in refusal()
    assert fetch(NAME) == target


def test_a_waiting_process_finds_what_the_other_one_fetched(hub: Hub) -> None:
    offer = ask_hub(NAME)
    folder = fetch(NAME)
    hub.requests.clear()
    assert download(offer) == folder
    assert not hub.requests


def test_an_interrupt_leaves_no_target_and_the_next_call_goes_on(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(offer: Any, file: Any, into: Any, bar: Any) -> None:
        if file.name == WEIGHTS:
            into.write(hub.repos[NAME].files[WEIGHTS][:7000])
            raise KeyboardInterrupt
        receive(offer, file, into, bar)

    with monkeypatch.context() as patch:
        patch.setattr(fetch_module, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(NAME)
    assert f"fetching {NAME} was interrupted (7.9 kB of" in capsys.readouterr().err
    assert find_local(NAME) is None
    fetch(NAME)
    assert ranges(hub.asked_for(WEIGHTS)) == ["bytes=7000-"]


def test_an_interruption_loses_less_than_one_piece(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "PIECE_BYTES", PIECE_BYTES)
    hub.repos[NAME].files["tokenizer.json"] = bytes(2_000_000)
    hub.cuts["tokenizer.json"] = [1_000_000] + [0] * 9
    refusal()
    [beginning] = beside(folder_of(NAME), "partial").glob("tokenizer.json.*.part")
    assert 700_000 < beginning.stat().st_size <= 1_000_000


def test_a_reset_connection_resumes_where_it_stopped(hub: Hub, llama: Path) -> None:
    hub.resets, hub.cuts[WEIGHTS] = True, [50_000]
    assert contents(fetch(NAME))[WEIGHTS] == contents(llama)[WEIGHTS]
    assert ranges(hub.asked_for(WEIGHTS)) == [None, f"bytes={50_000 // 4096 * 4096}-"]


def test_a_busy_hub_is_retried(hub: Hub, llama: Path) -> None:
    hub.cuts[WEIGHTS] = [50_000, 50_000]
    hub.hiccups[WEIGHTS] = [200, 503, 500, 503, 502, 200, 503, 503, 503, 503, 200]
    assert contents(fetch(NAME))[WEIGHTS] == contents(llama)[WEIGHTS]
    assert len(hub.asked_for(WEIGHTS)) == 3


def test_a_server_that_ignores_ranges_and_hangs_up_loses_no_data(hub: Hub) -> None:
    hub.ignores_ranges, hub.cuts[WEIGHTS] = True, [50_000] + [100] * 9
    refusal()
    [beginning] = beside(folder_of(NAME), "partial").glob("*.part")
    assert beginning.stat().st_size == 50_000 // 4096 * 4096


@pytest.mark.parametrize(("seconds", "slept"), [(20, [20] * 4), (61, [])])
def test_a_requested_wait_is_obeyed_for_at_most_one_minute(
    seconds: int, slept: list[int], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(hub_module, "time", SimpleNamespace(sleep=waits.append))
    hub.statuses[WEIGHTS], hub.retry_after = 429, seconds
    asks = "status 429: try again later (" if slept else f"status 429 and asks to wait {seconds} s:"
    assert asks in refusal()
    assert waits == slept


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
def test_a_disk_error_is_not_reported_as_a_network_error(
    number: int, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.BytesIO):
        def write(self, content: Any) -> int:
            raise OSError(number, "it is broken")

    with pytest.raises(OSError, match="it is broken"):
        receive(ask_hub(NAME), ask_hub(NAME).files[0], Broken())

    def broken(offer: Any, file: Any, into: Any, bar: Any) -> None:
        raise OSError(number, "it is broken")

    monkeypatch.setattr(fetch_module, "receive", broken)
    with pytest.raises(OSError, match="it is broken") as refused:
        fetch(NAME)
    assert "config.json" in refused.value.filename


# --------------------------------------------------------------------------------- what hubs refuse


def test_an_unknown_name_is_reported_with_the_hub(hub: Hub) -> None:
    assert f"there is no model someone/else at {hub.url}" in refusal("someone/else")
    assert left_in(models_folder()) == []


def test_an_unknown_name_is_reported_alike_with_a_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert f"there is no model someone/else at {hub.url}" in refusal("someone/else")


def test_an_unknown_revision_is_reported(hub: Hub) -> None:
    assert f"{NAME} has no revision 'v9'" in refusal(revision="v9")


def test_a_private_model_needs_the_right_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME].token = "mine"
    assert "or it is private" in refusal()
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "(it says: Invalid credentials in Authorization header): use another token" in refusal()
    monkeypatch.setenv("HF_TOKEN", "mine")
    fetch(NAME)


def test_an_expired_token_is_reported_as_such(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "expired")
    sentence = refusal()
    assert f"there is no model {NAME}" in sentence
    assert "use another token if yours is wrong or expired (HF_TOKEN, or that" in sentence
    assert sentence.endswith("(it says: User Access Token is expired).")


@pytest.mark.parametrize("token", [None, "somebody"])
def test_a_gated_model_is_refused_with_the_page_of_its_licence(
    token: str | None, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[NAME].token, hub.repos[NAME].gated = "mine", True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    sentence = refusal()
    assert (
        f"only after its licence was accepted: accept it at {hub.url}/{NAME}, and set HF_TOKEN"
        in sentence
    )
    assert left_in(models_folder()) == []


def test_the_token_is_sent_to_the_hub_and_not_to_where_it_stores_its_files(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "mine")
    fetch(NAME)
    sent = {"/storage/" in request.path: request.authorization for request in hub.requests}
    assert sent == {False: "Bearer mine", True: None}


@pytest.mark.parametrize("status", [400, 403, 416, 429, 451, 500, 503])
def test_an_unexpected_answer_is_reported_with_its_status(status: int, hub: Hub) -> None:
    hub.statuses["api"] = status
    sentence = refusal()
    assert f"with status {status}" in sentence
    assert ("try again later" in sentence) == (status in (429, 500, 503))
    assert ("(it says: no)" in sentence) == (status not in (429, 500, 503))


def test_a_password_in_the_address_of_a_hub_is_never_shown(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", "//me:secret@"))
    hub.statuses[WEIGHTS] = 500
    assert f"{hub.url} answered" in refusal()
    hub.statuses.clear()
    fetch_and_report(NAME)
    assert all(request.authorization for request in hub.asked_for("config.json"))
    assert "secret" not in "".join(capsys.readouterr())
    assert "secret" not in (folder_of(NAME) / "source.json").read_text()
    assert "secret" not in repr(ask_hub(NAME))
    monkeypatch.setenv("HF_ENDPOINT", "me:secret@hub.example")
    assert refusal("a/b") == "HF_ENDPOINT is 'hub.example': begin it with https://."


def test_a_hub_that_fails_midway_keeps_the_partial_download(hub: Hub) -> None:
    hub.statuses[WEIGHTS] = 500
    assert "status 500: try again later (" in refusal()
    hub.statuses.clear()
    fetch(NAME)
    assert len(hub.asked_for("config.json")) == 1


def test_a_vanished_file_is_reported(hub: Hub) -> None:
    offer = ask_hub(NAME)
    hub.statuses[WEIGHTS] = 404
    with pytest.raises(FetchError, match=r"was removed from .* meanwhile: fetch again"):
        download(offer)


def test_an_unreachable_hub_is_reported_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert f"http://127.0.0.1:{port} could not be reached (" in refusal()
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert "http://hub.invalid could not be reached (" in refusal()
    monkeypatch.setenv("HF_ENDPOINT", "no-url")
    assert "no-url" in refusal()
    assert left_in(models_folder()) == []


def test_a_hub_that_never_answers_is_reported(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.silent = True
    assert "could not be reached (" in refusal()


def test_a_server_that_is_not_a_hub_is_reported(hub: Hub) -> None:
    hub.nonsense = True
    assert "does not answer as a hub does (" in refusal()


def test_a_hub_without_checksums_is_refused(hub: Hub) -> None:
    hub.tells_checksums = False
    assert "provides no sizes and checksums" in refusal()


def test_offline_mode_is_reported_before_any_request(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert refusal() == f"HF_HUB_OFFLINE is set: unset it to fetch {NAME}."
    assert not hub.requests


# ---------------------------------------------------------------------- what cannot be loaded here


def test_an_unsupported_architecture_is_refused_before_the_download(hub: Hub) -> None:
    hub.repos[NAME].files["config.json"] = b'{"architectures": ["MambaForCausalLM"]}'
    with pytest.raises(UnsupportedModel, match="names the architecture MambaForCausalLM"):
        fetch(NAME)
    assert {r.file for r in hub.requests if r.file} == {"config.json"}
    assert left_in(models_folder()) == []


def test_weights_that_do_not_fit_the_config_are_not_kept(hub: Hub, tmp_path: Path) -> None:
    other = make_checkpoint("llama", tmp_path / "other", num_hidden_layers=1)
    hub.repos[NAME].files[WEIGHTS] = contents(other)[WEIGHTS]
    with pytest.raises(CheckpointError, match="lacks 9 of the 21 tensors"):
        fetch(NAME)
    assert left_in(models_folder()) == []


def test_a_repository_without_weights_that_can_be_read_is_refused(hub: Hub) -> None:
    files = hub.repos[NAME].files
    del files[WEIGHTS]
    assert "contains neither model.safetensors nor pytorch_model.bin: choose" in refusal()
    files["small.Q4_K_M.gguf"] = b"x"
    assert "(small.Q4_K_M.gguf is not read here)" in refusal()
    del files["config.json"]
    assert "contains no config.json" in refusal()


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (b'{"weight_map": {"a": "model-1.safetensors"}}', "lacks 1 of the files"),
        (
            b'{"weight_map": {"a": "../../model-1.safetensors"}}',
            "does not list valid names of shards",
        ),
        (b'{"weight_map": {"a": "model-1.bin"}}', "does not list valid names of shards"),
        (
            b'{"weight_map": {"a": "%s.safetensors"}}' % (b"a" * 200),
            "does not list valid names of shards",
        ),
        (b'{"weight_map": {}}', "does not list valid names of shards"),
        (b"[]", "does not list valid names of shards"),
        (b"\x80", "does not list valid names of shards"),
    ],
)
def test_an_invalid_index_is_refused(index: bytes, sentence: str, hub: Hub) -> None:
    files = hub.repos[NAME].files
    del files[WEIGHTS]
    files["model.safetensors.index.json"] = index
    assert sentence in refusal()
    assert left_in(models_folder()) == []


# ---------------------------------------------------------------------------------------- the disk


def test_too_little_disk_space_is_reported_before_the_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    needs = f"{NAME} needs {size_of(hub)}, but the disk of {models_folder()} has 100 kB free"
    assert needs in refusal()
    assert not hub.asked_for(WEIGHTS)
    assert left_in(models_folder()) == []


def test_conversion_needs_room_for_the_weights_twice(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_checkpoint("opt", tmp_path / "opt")
    published = pickle_weights(original, tmp_path / "pickled", 1)
    size = (published / "pytorch_model.bin").stat().st_size
    hub.add("someone/opt", published)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size * 3 // 2))
    assert f"of which {in_words(size)} to convert its weights" in refusal("someone/opt")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size * 5 // 2))
    fetch("someone/opt")


def test_a_full_disk_keeps_the_partial_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(offer: Any, file: Any, into: Any, bar: Any) -> None:
        into.write(b"{" * 10)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetch_module, "receive", full)
        sentence = refusal()
    assert f"{models_folder()} is full: free some of it (10 bytes of {size_of(hub)}" in sentence


# ---------------------------------------------------------------------------------- what is printed


def test_a_pipe_sees_no_bar_and_a_terminal_one_over_all_bytes(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(NAME)
    assert capsys.readouterr() == ("", "")
    for progress in (False, True):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            fetch(NAME, directory=models_folder() / str(progress), progress=progress)
        assert (f"{NAME}: 100%" in terminal.getvalue()) == progress
        assert terminal.getvalue().count("\n") == progress
    assert capsys.readouterr() == ("", "")


def test_a_progress_bar_starts_at_what_is_already_downloaded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cuts[WEIGHTS] = [len(hub.repos[NAME].files[WEIGHTS]) * 9 // 10] + [0] * 9
    refusal()
    hub.cuts.clear()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch(NAME)
    first, *_, last = re.findall(r"(\d+)%", terminal.getvalue())
    assert int(first) > 80
    assert int(last) == 100


class Terminal(io.StringIO):
    """A stream with a person at it."""

    def isatty(self) -> bool:
        return True


def test_the_command_prints_what_it_downloads_and_how_to_use_it(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch_and_report(NAME)
    out, err = capsys.readouterr()
    assert err == f"fetching {NAME} from {hub.url}: 3 files, {size_of(hub)}, licence: mit\n"
    assert out.startswith(f"{NAME} was fetched: {folder_of(NAME)} (")
    assert f'LLM("{NAME}")' in out
    fetch_and_report(NAME, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["folder"], report["fetched"]) == (str(folder_of(NAME)), False)


def test_the_command_quotes_a_folder_and_prints_what_the_model_lacks(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my models"
    fetch_and_report(NAME, directory=folder / "a")
    out = capsys.readouterr().out
    assert "it has no tokenizer: give prompts as token ids." in out
    assert "minipaged generate" not in out
    hub.repos[NAME].files["tokenizer.json"] = b"{}"
    fetch_and_report(NAME, directory=folder / "b")
    out = capsys.readouterr().out
    assert f"--model '{folder / 'b'}'\n" in out
    assert f'LLM("{folder / "b"}")' in out
    assert "no tokenizer" not in out


def test_the_list_shows_sizes_licences_and_downloaded_models(
    hub: Hub, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("openai-community/gpt2", llama)
    fetch("gpt2")
    print_known_models(as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(KNOWN_MODELS)
    assert [row["name"] for row in rows if row["folder"]] == ["openai-community/gpt2"]
    print_known_models()
    table = capsys.readouterr().out
    assert all(model.name in table for model in KNOWN_MODELS)
    assert re.search(r"gpt2 +124 M +551 MB +MIT *\n", table)
    assert re.search(r"opt-6.7b +6,658 M +13 GB +OPT-175B \(non-commercial\)", table)
    assert "On this machine: openai-community/gpt2.\n" in table
    assert "minipaged[tokenizers]" in table


def test_the_list_needs_neither_torch_nor_the_hub_s_library() -> None:
    program = (
        "import sys; from minipaged.cli.fetch import print_known_models; print_known_models();"
        "sys.exit(bool({'torch', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_size_is_printed_before_the_download(hub: Hub) -> None:
    model = ModelName.parse(NAME)
    assert find_here(model) is None
    offer = ask_hub(model)
    assert offer.num_bytes == sum(map(len, hub.repos[NAME].files.values()))
    assert not [request for request in hub.requests if request.file]
    assert download(offer) == find_here(model)


# ------------------------------------------------------------------------------ a model by its name


def test_a_fetched_model_is_found_by_its_name(hub: Hub, llama: Path) -> None:
    with pytest.raises(CheckpointError, match=f"fetch it by `minipaged fetch {NAME}`"):
        LLM(NAME)
    assert not hub.requests, "nothing is asked, and nothing downloaded, until someone says so"
    folder = fetch(NAME)
    assert LLM(NAME, num_blocks=8).folder == folder


def test_a_model_that_is_not_downloaded_is_refused_with_its_size() -> None:
    with pytest.raises(
        CheckpointError, match=r"about 551 MB, licence: MIT\) by `minipaged fetch gpt2"
    ):
        LLM("gpt2")


def test_a_folder_has_precedence_over_a_model_name(
    hub: Hub, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)
    assert LLM(llama.name, num_blocks=8).folder == Path(llama.name)


@pytest.mark.parametrize(("answer", "fetched"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_a_person_is_asked_before_anything_is_downloaded(
    hub: Hub, answer: str, fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", shown)
    offer_to_fetch(NAME)
    assert f"{NAME} is not on this machine. Fetch it ({size_of(hub)})? [y/N]" in shown.getvalue()
    assert (find_local(NAME) is not None) == fetched
    assert any(request.file == WEIGHTS for request in hub.requests) == fetched


@pytest.mark.parametrize("model", [NAME, "storyteller", "./no/folder", ""])
def test_without_a_terminal_no_confirmation_is_asked_for(hub: Hub, model: str) -> None:
    offer_to_fetch(model)
    assert not hub.requests
