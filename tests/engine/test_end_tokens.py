"""Which token ends a sequence, when only the tokenizer's files name it."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint

from minipaged import LLM, SamplingParams

END = 256  # the bytes come first
RANKS = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
CONFIG = {"ranks": "bytes.tiktoken", "pattern": r"[^ ]+| ", "special_tokens": {"<|end|>": END}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint("llama", tmp_path, vocab_size=300, eos_token_id=None)
    (tmp_path / "tiktoken.json").write_text(json.dumps(CONFIG))
    (tmp_path / "bytes.tiktoken").write_text(RANKS)
    return tmp_path


def ends_at(folder: Path, token_id: int) -> bool:
    """Whether a sequence in which this token comes first ends with it."""
    params = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={token_id: 100.0})
    llm = LLM(folder, device="cpu", num_blocks=8)
    [output] = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.token_ids == [token_id] * len(completion.token_ids)
    return len(completion.token_ids) == 1 and completion.finish_reason == "stop"


def test_without_an_end_token_in_any_file_nothing_ends_a_sequence(folder: Path) -> None:
    assert not ends_at(folder, END)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", ["<|end|>", {"content": "<|end|>", "special": True}])
def test_an_end_token_named_only_by_the_tokenizer_ends_a_sequence(
    token: Any, name: str, folder: Path
) -> None:
    (folder / name).write_text(json.dumps({"eos_token": token}))
    assert ends_at(folder, END)


def test_the_end_token_of_the_tokenizer_need_not_be_special(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "~"}))
    assert ends_at(folder, ord("~"))


def test_the_end_tokens_of_all_files_count(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, END]}))
    assert LLM(folder, num_blocks=8).engine.executor.runner.model.config.eos_token_ids == (9, END)


@pytest.mark.parametrize("token", ["no such token", "", None, 7, {"content": None}])
def test_an_end_token_that_the_tokenizer_lacks_changes_nothing(token: Any, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert LLM(folder, num_blocks=8).engine.executor.runner.model.config.eos_token_ids == ()


def test_an_end_token_outside_the_vocabulary_changes_nothing(folder: Path) -> None:
    special = {"<|end|>": 300}
    (folder / "tiktoken.json").write_text(json.dumps(CONFIG | {"special_tokens": special}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert LLM(folder, num_blocks=8).engine.executor.runner.model.config.eos_token_ids == ()
