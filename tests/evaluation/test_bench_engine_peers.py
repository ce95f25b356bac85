"""Peers of `minipaged bench engine`: their environments, failures, tokens and files."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import minipaged
from in_this_process import InThisProcess

from minipaged.errors import InvalidOption
from minipaged.evaluation.bench import engine, engine_peer, engine_process, engine_sides
from minipaged.evaluation.bench.asked_process import AskedProcess
from minipaged.evaluation.bench.engine_gguf import write_gguf
from minipaged.evaluation.bench.engine_workload import QUICK, make_model
from minipaged.utils.threads import CHOSEN

FAKE = Path(__file__).parent.parent / "helpers" / "fake_peer.py"
QUICKLY = ("bench", "engine", "--quick", "--rounds", "1", "--against", "openvino", "--peers")
CASES = [case.name for case in QUICK.cases()]


@pytest.fixture(scope="module")
def right_tokens(tmp_path_factory):
    """The tokens of every prompt of two rounds, by this library."""
    folder = tmp_path_factory.mktemp("model")
    make_model(QUICK, folder)
    ours = engine_sides.Minipaged(engine._options(QUICK, folder, "float32"))
    tokens = {}
    for case in QUICK.cases():
        for number in range(2):
            requests = case.requests(number)
            found = ours.serve(requests, after_first=False)["tokens"]
            pairs = zip(requests, found, strict=True)
            tokens |= {json.dumps(prompt): each for (prompt, _), each in pairs}
    file = folder / "tokens.json"
    file.write_text(json.dumps(tokens), encoding="utf-8")
    return file


@pytest.fixture
def peer(monkeypatch, tmp_path, right_tokens):
    """Makes an environment whose interpreter runs the fake peer, with a fault; returns --peers."""
    monkeypatch.setattr(
        engine_process,
        "AskedProcess",
        lambda module, options, variables=None, python=None: (
            InThisProcess(module, options)
            if python is None
            else AskedProcess(module, options, variables, python)
        ),
    )

    def make(fault: str = "", has_package: bool = True) -> str:
        python = tmp_path / "openvino" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(
            f'#!/bin/sh\n[ "$2" = -c ] && exit {0 if has_package else 1}\n'
            f"exec '{sys.executable}' '{FAKE}' '{fault}' '{right_tokens}'\n",
            encoding="utf-8",
        )
        python.chmod(0o755)
        return str(tmp_path)

    return make


def rows_of(capsys, monkeypatch, *options, by="openvino"):
    code, out, err = minipaged(capsys, monkeypatch, *QUICKLY, *options, "--json")
    assert code == 0, err
    return [row for row in json.loads(out)["rows"] if row["by"] == by]


def test_a_peer_has_a_row_per_case_with_its_types_ratios_and_memory(capsys, monkeypatch, peer):
    rows = rows_of(capsys, monkeypatch, peer())
    assert [row["case"] for row in rows] == CASES
    for row in rows:
        assert row["failure"] is None
        assert (row["version"], row["weights"], row["keys"]) == ("1.2", "float32", "uint8")
        assert row["cores"] == 1.5
        assert row["num_alike"] == row["num_requests"]
        assert row["times_seconds"] > 0
        assert sys.platform != "linux" or 1e6 < row["peak_bytes"] < 1e8
    assert rows[0]["tokens_per_second"] == 7 / 0.5
    assert rows[CASES.index("prefill, 3 x 20")]["tokens_per_second"] == 3 * 20 / 0.5


def test_a_table_of_peers_fits_into_80_columns(capsys, monkeypatch, peer):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = minipaged(capsys, monkeypatch, *QUICKLY, peer("dies"))
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "openvino 1.2: weights in float32, keys in uint8" in out
    reason = "openvino has no figures: a measured process has ended (exit code 3)"
    assert out.replace("\n", " ").count(reason) == 1


def test_a_peer_that_dies_does_not_stop_the_others(capsys, monkeypatch, peer):
    rows = rows_of(capsys, monkeypatch, peer("dies"))
    failures = [row["failure"] for row in rows]
    assert failures[0] is None
    assert len(failures) == len(CASES)
    assert len(set(failures[2:])) == 1
    assert "has ended (exit code 3)" in failures[-1]


def test_a_peer_that_hangs_is_ended(capsys, monkeypatch, peer):
    monkeypatch.setattr(engine_process, "SECONDS_TO_RUN", 0.2)
    rows = rows_of(capsys, monkeypatch, peer("hangs"))
    assert {row["failure"] for row in rows} == {
        "a measured process was ended, because it did not answer within 0 s."
    }


def test_a_peer_that_cannot_load_the_model_is_not_asked_again(capsys, monkeypatch, peer):
    rows = rows_of(capsys, monkeypatch, peer("no model"))
    assert {row["failure"] for row in rows} == {"OSError: no model"}


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("wrong token", "openvino's token"),
        ("one token less", "openvino generated 5 tokens instead of 6"),
    ],
)
def test_a_peer_with_wrong_tokens_has_no_figures(capsys, monkeypatch, peer, fault, sentence):
    rows = rows_of(capsys, monkeypatch, peer(fault))
    assert sentence in rows[0]["failure"]
    assert "its time is meaningless" in rows[0]["failure"]
    assert all(row["failure"] is not None and row["tokens_per_second"] == 0 for row in rows)


def test_tokens_of_a_wrong_peer_are_not_compared_with_ours(capsys, monkeypatch, peer):
    rows = rows_of(capsys, monkeypatch, peer("wrong token"), by="minipaged")
    assert {(row["num_alike"], row["num_close"]) for row in rows} == {(None, 0)}


@pytest.mark.parametrize("has_package", [None, False])
def test_an_absent_environment_is_one_sentence_with_both_commands(
    capsys, monkeypatch, tmp_path, peer, has_package
):
    if has_package is not None:
        peer(has_package=has_package)
    code, out, err = minipaged(capsys, monkeypatch, *QUICKLY, str(tmp_path))
    own = tmp_path / "openvino"
    assert (code, out) == (2, "")
    assert f"`python -m venv {own}` and" in err
    assert f"`{own}/bin/pip install openvino-genai 'optimum-intel[openvino]'`" in err
    assert len(err.strip().splitlines()) == 1


def test_half_precision_is_a_peer_of_its_own():
    named = ["transformers", "transformers:half", "minipaged:half"]
    read = engine_process.read_peers(named, Path())
    assert [(each.name, each.half) for each in read] == [
        ("transformers", False),
        ("transformers, half", True),
        ("minipaged, half", True),
    ]
    with pytest.raises(InvalidOption, match="--against is 'minipaged': give vllm"):
        engine_process.read_peers(["minipaged"], Path())


def test_weights_in_float16_are_a_peer_of_this_library(capsys, monkeypatch):
    asked = ("bench", "engine", "--quick", "--rounds", "1", "--against", "minipaged:half")
    code, out, err = minipaged(capsys, monkeypatch, *asked, "--json")
    assert code == 0, err
    rows = [row for row in json.loads(out)["rows"] if row["by"] == "minipaged, half"]
    assert {row["weights"] for row in rows} == {"float16"}
    assert {row["keys"] for row in rows} == {"float32"}
    assert all(row["times_seconds"] > 0 and row["failure"] is None for row in rows)


# ---- the protocol --------------------------------------------------------------------------------


def test_the_file_of_the_peers_imports_nothing_that_an_environment_lacks():
    code = f"import runpy; runpy.run_path({engine_peer.__file__!r}, run_name='peer')"
    check = "; import sys; assert not {'torch', 'numpy', 'minipaged'} & set(sys.modules)"
    subprocess.run([sys.executable, "-I", "-c", code + check], check=True)


def test_what_an_engine_prints_is_not_an_answer_and_an_error_is(tmp_path):
    file = tmp_path / "package" / "noisy.py"
    file.parent.mkdir()
    file.write_text(
        "import os, runpy, sys\n"
        f"peer = runpy.run_path({engine_peer.__file__!r}, run_name='peer')\n"
        "def speak(): os.system('echo noise'); print('noise'); return 5\n"
        "def fail(): raise ValueError('no')\n"
        "peer['answer']({'speak': speak, 'fail': fail})\n",
        encoding="utf-8",
    )
    asked = "".join(json.dumps({"do": do}) + "\n" for do in ("speak", "fail", "speak"))
    run = subprocess.run(
        [sys.executable, file], input=asked, capture_output=True, text=True, check=True
    )
    assert [json.loads(line) for line in run.stdout.splitlines()] == [
        {"found": 5},
        {"failure": "ValueError: no"},
        {"found": 5},
    ]
    assert run.stderr.count("noise") == 4


def test_decoding_is_timed_from_when_every_sequence_has_its_first_token():
    def stream(requests):
        yield from [(0, [1]), (0, [1, 2]), (1, [7]), (0, [1, 2, 3]), (1, [7, 8])]

    requests = [([9], 3), ([9], 2)]
    whole = engine_peer.serve(stream, requests)
    assert whole["tokens"] == [[1, 2, 3], [7, 8]]
    assert whole["num_tokens"] == 5
    assert engine_peer.serve(stream, requests, after_first=True)["num_tokens"] == 2


# ---- the file for llama.cpp ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gguf_file_has_every_tensor_at_its_place(tmp_path, dtype):
    """Reads the file as its specification describes it."""
    make_model(QUICK, tmp_path)
    raw = write_gguf(tmp_path, dtype).read_bytes()
    place = 0

    def take(form):
        nonlocal place
        values = struct.unpack_from(f"<{form}", raw, place)
        place += struct.calcsize(f"<{form}")
        return values[0]

    def take_text():
        nonlocal place
        length = take("Q")
        place += length
        return raw[place - length : place].decode()

    def take_value(kind):
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [take_value(inner) for _ in range(count)]
        return take_text() if kind == 8 else take({4: "I", 5: "i", 6: "f"}[kind])

    assert (take("4s"), take("I")) == (b"GGUF", 3)
    num_tensors, num_values = take("Q"), take("Q")
    values = {take_text(): take_value(take("I")) for _ in range(num_values)}
    assert values["llama.attention.head_count_kv"] == 2
    assert values["tokenizer.ggml.tokens"][:2] == ["<0>", "<1>"]
    tensors = {}
    for _ in range(num_tensors):
        name = take_text()
        sizes = [take("Q") for _ in range(take("I"))]
        tensors[name] = (sizes, take("I"), take("Q"))
    start = place + -place % 32
    assert num_tensors == 2 + 9 * QUICK.hf["num_hidden_layers"]
    sizes, kind, offset = tensors["token_embd.weight"]
    assert (sizes, kind) == ([128, 512], int(dtype is torch.float16))
    assert offset % 32 == 0

    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    found = torch.frombuffer(
        bytearray(raw), dtype=dtype, count=512 * 128, offset=start + offset
    ).view(512, 128)
    assert torch.equal(found, saved["model.embed_tokens.weight"].to(dtype))
    sizes, _, offset = tensors["blk.1.attn_q.weight"]
    found = torch.frombuffer(bytearray(raw), dtype=dtype, count=128 * 128, offset=start + offset)
    rows = found.view(128, 128)
    wanted = saved["model.layers.1.self_attn.q_proj.weight"].to(dtype)
    assert torch.equal(rows[0], wanted[0])  # a head of 32: rows 0, 16, 1, 17, ...
    assert torch.equal(rows[1], wanted[16])
    assert torch.equal(rows[34], wanted[33])


@pytest.mark.parametrize(("python", "expected"), [(None, "chosen"), (Path(sys.executable), None)])
def test_a_peer_gets_no_variable_that_this_library_has_chosen(monkeypatch, python, expected):
    monkeypatch.setenv("A_WAIT_POLICY", "chosen")
    monkeypatch.setitem(CHOSEN, "A_WAIT_POLICY", "chosen")
    with AskedProcess("asked_program", {}, {}, python) as process:
        assert process.ask("variable", 30, name="A_WAIT_POLICY") == expected
