"""From pickles to safetensors: the same tensors, and none of the code that a pickle can hold."""

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from minipaged.attention.backend import BACKENDS
from minipaged.cli.fetch import convert
from minipaged.errors import CheckpointError
from minipaged.models.hub.convert import convert_to_safetensors, find_pickled
from minipaged.models.loader import load_model

SINGLE = "pytorch_model.bin"


def save(folder: Path, state: Any, name: str = SINGLE, **options: Any) -> Path:
    torch.save(state, folder / name, **options)
    return folder


def save_shards(folder: Path, *shards: dict[str, Tensor]) -> Path:
    names = [f"pytorch_model-{i + 1:05}-of-{len(shards):05}.bin" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save(folder, shard, name)
    index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def assert_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name
        assert tensor.dtype == others[name].dtype


def refusal(folder: Path) -> str:
    before = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    with pytest.raises(CheckpointError) as refused:
        convert_to_safetensors(folder)
    sentence = str(refused.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert ": " in sentence, "an error says what is wrong, a colon, and what to change"
    assert not folder.is_dir() or {path.name for path in folder.iterdir()} == before
    return sentence


TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4).to(torch.bfloat16),
    "b.weight": torch.arange(12).reshape(3, 4).float().t(),  # not contiguous
    "c.mask": torch.tensor([True, False]),
    "d.empty": torch.empty(0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_checkpoint_loads_as_the_original_does(family: str, tmp_path: Path) -> None:
    original = make_checkpoint(family, tmp_path / "original")
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(original / "config.json", folder)
    save(folder, load_file(original / "model.safetensors"))
    [file] = convert_to_safetensors(folder)
    assert file == folder / "model.safetensors"
    assert file.stat().st_mode == (folder / "pytorch_model.bin").stat().st_mode
    backend = BACKENDS["reference"]
    converted, expected = load_model(folder, backend), load_model(original, backend)
    assert_equal(dict(converted.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("zipped", [True, False], ids=["since torch 1.6", "before"])
def test_all_tensors_keep_their_numbers_and_dtypes(zipped: bool, tmp_path: Path) -> None:
    save(tmp_path, TENSORS, _use_new_zipfile_serialization=zipped)
    [file] = convert_to_safetensors(tmp_path)
    assert_equal(load_file(file), TENSORS)
    assert (tmp_path / SINGLE).is_file(), "the pickled file is the user's, and stays"


def test_shards_become_as_many_shards_and_an_index(tmp_path: Path) -> None:
    first, second = {"a": torch.ones(2, 3), "b": torch.zeros(4)}, {"c": torch.arange(5)}
    written = convert_to_safetensors(save_shards(tmp_path, first, second))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [path.name for path in written] == [*names, "model.safetensors.index.json"]
    assert_equal(load_file(tmp_path / names[0]), first)
    assert_equal(load_file(tmp_path / names[1]), second)
    index = json.loads(written[-1].read_text())
    assert index["weight_map"] == {"a": names[0], "b": names[0], "c": names[1]}
    assert index["metadata"] == {"total_size": 24 + 16 + 40}


@pytest.mark.parametrize("head", ["lm_head.weight", "model.lm_head.weight"])
def test_an_output_matrix_that_is_the_embedding_is_stored_once(head: str, tmp_path: Path) -> None:
    embedding = torch.randn(7, 3)
    save(tmp_path, {head: embedding, "wte.weight": embedding, "norm": torch.ones(3)})
    [file] = convert_to_safetensors(tmp_path)
    assert load_file(file).keys() == {"wte.weight", "norm"}


def test_an_output_matrix_of_its_own_is_kept(tmp_path: Path) -> None:
    save(tmp_path, {"lm_head.weight": torch.randn(7, 3), "wte.weight": torch.randn(7, 3)})
    [file] = convert_to_safetensors(tmp_path)
    assert load_file(file).keys() == {"wte.weight", "lm_head.weight"}


@pytest.mark.parametrize("rows", ["others", "the same, turned", "the same, shorter"])
def test_the_output_matrix_is_omitted_only_if_it_is_the_embedding(
    rows: str, tmp_path: Path
) -> None:
    flat = torch.arange(24.0)
    embedding = flat[:9].view(3, 3)
    heads = {"others": flat[9:18].view(3, 3), "the same, turned": embedding.t()}
    views = {"lm_head.weight": heads.get(rows, embedding[:2]), "wte.weight": embedding}
    [file] = convert_to_safetensors(save(tmp_path, views))
    assert_equal(load_file(file), views)


def test_a_lazy_negation_is_materialised(tmp_path: Path) -> None:
    view = torch.tensor([1 + 2j]).conj().imag
    [file] = convert_to_safetensors(save(tmp_path, {"a": view}))
    assert load_file(file)["a"].tolist() == [-2.0]


def test_other_tensors_that_share_memory_are_stored_separately(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    views = {"whole": whole, "half": whole[6:], "rows": whole.reshape(3, 4)}
    [file] = convert_to_safetensors(save(tmp_path, views))
    assert_equal(load_file(file), views)


# ----------------------------------------------------------------------------------------- refused


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_named_and_not_run(zipped: bool, tmp_path: Path) -> None:
    trap = {"a.weight": torch.ones(3), "b.weight": Touch(tmp_path / "it-ran")}
    save(tmp_path, trap, _use_new_zipfile_serialization=zipped)
    sentence = refusal(tmp_path)
    assert f"{tmp_path / SINGLE} contains more than tensors (posix.mkdir)" in sentence
    assert not (tmp_path / "it-ran").exists()


def test_a_plain_pickle_is_not_run_either(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(pickle.dumps(Touch(tmp_path / "it-ran"), protocol=2))
    assert "contains more than tensors" in refusal(tmp_path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept_bytes", [0, 5, 100, 3000])
def test_a_file_cut_short_is_named_with_its_size(
    kept_bytes: int, zipped: bool, tmp_path: Path
) -> None:
    save(tmp_path, {"a": torch.randn(50, 50)}, _use_new_zipfile_serialization=zipped)
    file = tmp_path / SINGLE
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert f"{file} of {kept_bytes} bytes is cut short" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"model": {"a": torch.ones(2)}, "step": 3}, "contains a dict under 'model'"),
        ({"a": torch.ones(2), "step": 3}, "contains a int under 'step', where a tensor should be"),
        ([torch.ones(2)], "contains a list without named tensors"),
        ({}, "contains a dict without named tensors"),
    ],
)
def test_a_file_that_is_not_a_table_of_tensors_is_refused(
    state: Any, sentence: str, tmp_path: Path
) -> None:
    assert sentence in refusal(save(tmp_path, state))


def odd_tensor(kind: str) -> Tensor:
    ones = torch.ones(2, 2)
    if kind == "sparse":
        return ones.to_sparse()
    if kind == "nested":
        return torch.nested.nested_tensor([ones, ones])
    if kind == "quantized":
        return torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8)
    return ones.to("meta") if kind == "without data" else ones.to(torch.complex64)


@pytest.mark.filterwarnings("ignore")  # torch itself discourages most of them
@pytest.mark.parametrize(
    "kind", ["sparse", "nested", "quantized", "without data", "complex numbers"]
)
def test_a_value_that_is_not_a_plain_tensor_is_refused(kind: str, tmp_path: Path) -> None:
    sentence = refusal(save(tmp_path, {"a": odd_tensor(kind)}))
    assert kind in sentence
    assert "under 'a', where a tensor should be" in sentence


@pytest.mark.parametrize("name", ["a\udc80", "a\nb", "__metadata__"])
def test_a_name_that_no_tensor_can_have_is_refused(name: str, tmp_path: Path) -> None:
    sentence = refusal(save(tmp_path, {name: torch.ones(2)}))
    assert f"contains a tensor under {name!a}, which is not a name" in sentence


@pytest.mark.parametrize(
    "kind", [AssertionError, TypeError, AttributeError, struct.error, RecursionError, KeyError]
)
def test_any_error_of_torch_on_a_broken_file_becomes_one_sentence(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise kind("some\nlines")

    monkeypatch.setattr(torch, "load", broken)
    assert "is cut short or not a torch file (" in refusal(save(tmp_path, TENSORS))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_in_which_some_bytes_changed_is_read_or_refused(
    zipped: bool, tmp_path: Path
) -> None:
    file = save(tmp_path, {"a": torch.ones(9)}, _use_new_zipfile_serialization=zipped) / SINGLE
    content, numbers = file.read_bytes(), random.Random(1)
    for _ in range(100):
        changed = bytearray(content)
        for _ in range(numbers.choice([1, 2, 5])):
            changed[numbers.randrange(min(700, len(content)))] = numbers.randrange(256)
        file.write_bytes(changed)
        with contextlib.suppress(CheckpointError):
            [converted] = convert_to_safetensors(tmp_path)
            converted.unlink()
        assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_too_little_memory_is_reported(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.zeros(1).expand(2**46)})  # a number in the file, 256 TB written out
    with pytest.raises(OSError, match=r"too little memory to convert 1.* kB: close") as refused:
        convert_to_safetensors(tmp_path)
    assert (refused.value.errno, refused.value.filename) == (errno.ENOMEM, str(tmp_path / SINGLE))
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_leftovers_of_a_killed_conversion_are_removed(tmp_path: Path) -> None:
    left = save(tmp_path, TENSORS) / ".minipaged-converting-abc"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half of it")
    convert_to_safetensors(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", SINGLE]


@pytest.mark.parametrize("name", ["a" * 300 + ".bin", "a\0b.bin"])
def test_an_index_with_names_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    index = {"weight_map": {"a": name}}
    (tmp_path / f"{SINGLE}.index.json").write_text(json.dumps(index))
    refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_shards(tmp_path, {"a": torch.ones(2)}, {"b": torch.ones(2)})
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    assert "lacks 1 of the 2 shards" in refusal(tmp_path)


def test_a_fault_in_the_last_shard_leaves_no_partial_checkpoint(tmp_path: Path) -> None:
    save_shards(tmp_path, {"a": torch.ones(2)}, {"b": torch.ones(2)})
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(b"")
    assert "00002-of-00002.bin of 0 bytes is cut short" in refusal(tmp_path)


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(10_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # of one file: as good as full
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            convert_to_safetensors(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_a_folder_without_pickled_weights_is_refused(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "gone")
    assert "contains neither pytorch_model.bin nor" in refusal(tmp_path)
    (tmp_path / f"{SINGLE}.index.json").write_text("{}")
    assert "has no weight_map" in refusal(tmp_path)
    save(tmp_path, TENSORS)
    convert_to_safetensors(tmp_path)
    assert "already contains safetensors" in refusal(tmp_path)


def test_the_command_prints_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_pickled(save(tmp_path, TENSORS)) == [tmp_path / SINGLE]
    convert(tmp_path)
    out = capsys.readouterr().out
    assert f"{tmp_path / 'model.safetensors'} (" in out
    assert "pytorch_model.bin can be deleted." in out
