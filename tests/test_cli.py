"""The command line as a person or a script meets it."""

import json
import os
import subprocess
import sys

import pytest
from checkpoints import make_checkpoint

from minipaged import cli


def minipaged(capsys, monkeypatch, *arguments: str, stdin: str | None = None):
    """Run a command in this process: (exit code, standard output, standard error)."""
    import io

    monkeypatch.setattr(sys, "argv", ["minipaged", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


def test_demo_answers_eight_questions_and_says_which_are_right(capsys, monkeypatch):
    code, out, _ = minipaged(capsys, monkeypatch, "demo", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["of"] == len(report["answers"]) == 8
    assert report["right"] == sum(a["right"] for a in report["answers"])
    assert all(a["right"] == (a["answer"] == a["expected"]) for a in report["answers"])
    assert max(a["looks_back_tokens"] for a in report["answers"]) > 300


def test_a_starved_demo_gives_the_same_answers(capsys, monkeypatch):
    _, ample, _ = minipaged(capsys, monkeypatch, "demo", "--json")
    for preemption in ("recompute", "swap"):
        _, starved, _ = minipaged(
            capsys, monkeypatch, "demo", "--json", "--num-blocks", "33", "--preemption", preemption
        )
        assert json.loads(starved)["answers"] == json.loads(ample)["answers"]


def test_demo_shows_the_questions_and_the_pool(capsys, monkeypatch):
    code, out, _ = minipaged(capsys, monkeypatch, "demo", "--show-blocks")
    assert code == 0
    assert "right" in out
    assert "The pool at its fullest" in out
    assert "█" in out


def test_a_trace_is_a_file_of_versioned_events_and_ends_with_an_empty_pool(
    capsys, monkeypatch, tmp_path
):
    trace = tmp_path / "events.jsonl"
    code, _, _ = minipaged(
        capsys, monkeypatch, "generate", "Once", "Once upon", "Once upon a time", "--json",
        "--max-tokens", "60", "--ignore-eos", "--block-size", "4", "--num-blocks", "20",
        "--preemption", "swap", "--trace", str(trace),
    )  # fmt: skip
    assert code == 0
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    assert {e["v"] for e in events} == {1}
    kinds = {e["event"] for e in events}
    assert {"schedule", "admit", "append", "free", "allocate", "release"} <= kinds
    assert {"preempt", "swap_out", "swap_in"} <= kinds
    owned: dict[tuple[str, int], int] = {}
    for event in events:
        if event["event"] in ("allocate", "share", "release"):
            owned[event["pool"], event["block"]] = event["owners"]
    assert set(owned.values()) == {0}
    assert [e["step"] for e in events] == sorted(e["step"] for e in events)


def test_a_trace_of_a_run_that_fails_is_not_left_half_written(capsys, monkeypatch, tmp_path):
    trace = tmp_path / "events.jsonl"
    code, _, _ = minipaged(capsys, monkeypatch, "demo", "--num-blocks", "2", "--trace", str(trace))
    assert code == 2
    assert list(tmp_path.iterdir()) == []


def test_generate_goes_on_from_each_prompt(capsys, monkeypatch):
    code, out, _ = minipaged(
        capsys, monkeypatch, "generate", "Once upon a time Theo", "Once upon a time Mia",
        "--temperature", "0", "--max-tokens", "5",
    )  # fmt: skip
    assert code == 0
    assert "Once upon a time Theo the" in out
    assert "Once upon a time Mia the" in out


def test_generate_reads_lines_and_writes_json_lines(capsys, monkeypatch):
    code, out, _ = minipaged(
        capsys, monkeypatch, "generate", "-", "--json", "--max-tokens", "3",
        stdin="Once upon a time\n\nOnce upon\n",
    )  # fmt: skip
    outputs = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [o["prompt"] for o in outputs] == ["Once upon a time", "Once upon"]
    assert all(len(o["outputs"][0]["token_ids"]) <= 3 for o in outputs)


def test_chat_answers_from_the_story_it_was_told(capsys, monkeypatch):
    code, out, _ = minipaged(
        capsys, monkeypatch, "chat",
        "--system", "Once upon a time Theo the frog put the white key in the meadow.",
        stdin="What did Theo do?\nWhat colour is the key of Theo?\n\nnever read\n",
    )  # fmt: skip
    assert code == 0
    assert out.splitlines()[-2:] == [" Theo the frog put the white key in the meadow.", " White."]


def test_chat_tells_a_story_of_its_own_to_ask_about(capsys, monkeypatch):
    from minipaged.stories import tell

    story = tell(num_facts=6, seed=3)
    [question] = [q for q in story.questions if (q.kind, q.fact_index) == ("animal", 2)]
    code, out, _ = minipaged(capsys, monkeypatch, "chat", "--seed", "3", stdin=question.text)
    assert code == 0
    assert " ".join(out.split()).startswith(story.text)
    assert out.splitlines()[-1].strip() == question.answer


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "--num-block", "3"], "No such option: --num-block"),
        (["dance"], "No such command 'dance'"),
        (["demo", "--block-size", "large"], "'--block-size'"),
        (["demo", "--block-size", "0"], "block_size is 0"),
        (["demo", "--num-blocks", "1"], "the pool has 1"),
        (["demo", "--attention-backend", "magic"], "no attention backend 'magic'"),
        (["demo", "--preemption", "never"], "preemption is 'never'"),
        (["demo", "--trace", "no/such/folder/t"], "no/such/folder/t.part: No such file"),
        (["generate", "hi", "--model", "nowhere"], "no folder 'nowhere'"),
        (["generate", "hi", "--temperature", "-1"], "temperature is -1"),
        (["generate"], "Missing argument"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, monkeypatch, arguments, sentence):
    code, out, err = minipaged(capsys, monkeypatch, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("minipaged: ")]
    assert code == 2
    assert out == ""
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "Traceback" not in err


def test_a_model_without_a_tokenizer_says_so(capsys, monkeypatch, tmp_path):
    folder = make_checkpoint("gpt2", tmp_path)
    code, _, err = minipaged(capsys, monkeypatch, "generate", "hi", "--model", str(folder))
    assert code == 2
    assert "holds no tokenizer" in err


def test_the_version_is_printed(capsys, monkeypatch):
    from minipaged import __version__

    code, out, _ = minipaged(capsys, monkeypatch, "--version")
    assert (code, out) == (0, f"minipaged {__version__}\n")


def test_python_dash_m_is_the_same_program():
    result = subprocess.run(
        [sys.executable, "-m", "minipaged", "dance"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert result.returncode == 2
    assert result.stderr == "minipaged: No such command 'dance'.\n"
