"""The command line as a person or a script meets it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from commands import minipaged


def test_demo_answers_eight_questions_and_marks_the_right_ones(capsys, monkeypatch):
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
            capsys, monkeypatch, "demo", "--json", "--num-blocks", "36", "--preemption", preemption
        )
        assert json.loads(starved)["answers"] == json.loads(ample)["answers"]


def test_demo_shows_the_questions_and_the_pool(capsys, monkeypatch):
    code, out, _ = minipaged(capsys, monkeypatch, "demo", "--show-blocks")
    assert code == 0
    assert out.count(" right") + out.count(" wrong") >= 8
    picture = out[out.index("The pool at its fullest") :]
    assert re.search(r"^ +0 [A-Ha-h2-9+·]{64}$", picture, re.MULTILINE)
    assert "128 blocks of 16 in use" in " ".join(picture.split())


def test_demo_prints_what_it_does_before_it_loads_torch():
    without_torch = "import sys; sys.modules['torch'] = None; sys.argv = ['minipaged', 'demo']"
    command = f"{without_torch}; from minipaged.cli.main import main; main()"
    ran = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert ran.stdout.startswith("Eight stories of 1 to 48 sentences share a pool of 128 blocks.")
    assert "import of torch halted" in ran.stderr


def test_demo_ends_with_where_to_go_next(capsys, monkeypatch):
    _, out, _ = minipaged(capsys, monkeypatch, "demo")
    *_, heading, learn, labs, serve = out.splitlines()
    assert heading == "Where to go next:"
    assert "minipaged learn 0" in learn
    assert "minipaged lab list" in labs
    assert "minipaged serve" in serve


@pytest.mark.parametrize("group", ["", "bench", "lab", "soak", "trace"])
def test_a_list_of_commands_cuts_no_description_at_80_columns(group, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = minipaged(capsys, monkeypatch, *group.split(), "--help")
    assert "..." not in out.partition("Commands:")[2]


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
    assert {e["v"] for e in events} == {2}
    kinds = {e["event"] for e in events}
    assert {"schedule", "admit", "append", "free", "allocate", "release"} <= kinds
    assert {"preempt", "swap_out", "swap_in"} <= kinds
    owned: dict[tuple[str, int], int] = {}
    for event in events:
        if event["event"] in ("allocate", "share", "release"):
            owned[event["pool"], event["block"]] = event["ref_count"]
    cached = {block for e in events if e["event"] == "cache" for block in e["blocks"]}
    for event in events:
        if event["event"] == "evict":
            assert event["block"] in cached
    still_owned = {place for place, owners in owned.items() if owners}
    assert still_owned <= {("pool", block) for block in cached}, "by the prefix cache alone"
    assert set(owned.values()) == {0, 1}
    assert [e["step"] for e in events] == sorted(e["step"] for e in events)


def test_samples_and_beams_are_numbered_and_their_shared_blocks_counted(capsys, monkeypatch):
    for option in ("--n", "--beam-width"):
        code, out, err = minipaged(
            capsys, monkeypatch, "generate", "Once upon a time", option, "3", "--max-tokens", "9",
            "--block-size", "2", "--show-blocks",
        )  # fmt: skip
        assert code == 0
        assert [line[:8] for line in out.splitlines() if line.startswith("[")] == [
            "[1 of 3]", "[2 of 3]", "[3 of 3]",
        ]  # fmt: skip
        assert re.search(r"sharing saved [1-9]\d?% of the blocks", err)
        assert re.search(r"In total: 0 preemptions, \d+ blocks copied on write, 0 evicted", err)


def test_beam_search_refuses_the_options_of_sampling(capsys, monkeypatch):
    for options in (["--n", "2"], ["--temperature", "0.5"], ["--top-k", "3"], ["--stop", "x"]):
        code, _, err = minipaged(
            capsys, monkeypatch, "generate", "Once", "--beam-width", "2", *options
        )
        assert code == 2
        assert "with --beam-width, leave out" in err


def test_a_run_that_fails_leaves_no_partial_trace(capsys, monkeypatch, tmp_path):
    trace = tmp_path / "events.jsonl"
    code, _, _ = minipaged(
        capsys, monkeypatch, "generate", "x y z", "--num-blocks", "1", "--block-size", "1",
        "--trace", str(trace),
    )  # fmt: skip
    assert code == 2
    assert list(tmp_path.iterdir()) == []


def test_generate_continues_each_prompt(capsys, monkeypatch):
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


def test_chat_answers_from_the_given_story(capsys, monkeypatch):
    code, out, _ = minipaged(
        capsys, monkeypatch, "chat",
        "--system", "Once upon a time Theo the frog put the white key in the meadow.",
        stdin="What did Theo do with the key?\nWhat colour is the key of Theo?\n\nnever read\n",
    )  # fmt: skip
    assert code == 0
    assert out.splitlines()[-2:] == ["Theo the frog put the white key in the meadow.", "White."]


def test_chat_speaks_json_lines_to_machines(capsys, monkeypatch):
    code, out, err = minipaged(
        capsys, monkeypatch, "chat", "--json", "--num-blocks", "20",
        "--system", "Once upon a time Theo the frog put the white key in the meadow.",
        stdin="Which animal is Theo?\nWhere is the key of Theo?\n",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"question": "Which animal is Theo?", "answer": "A frog."},
        {"question": "Where is the key of Theo?", "answer": "In the meadow."},
    ]


def test_a_chat_that_outgrows_the_context_forgets_its_oldest_turns(capsys, monkeypatch):
    from minipaged.evaluation.stories import tell

    story = tell(num_facts=6, seed=0)
    [question] = [q for q in story.questions if (q.kind, q.fact_index) == ("place", 4)]
    code, out, _ = minipaged(capsys, monkeypatch, "chat", "--json", stdin=f"{question.text}\n" * 80)
    answers = [json.loads(line)["answer"] for line in out.splitlines()]
    assert code == 0
    assert len(answers) == 80
    assert answers.count(question.answer) >= 70


def test_a_model_without_a_chat_template_is_refused_before_the_first_question(
    capsys, monkeypatch, tmp_path
):
    make_checkpoint("llama", tmp_path)
    code, out, err = minipaged(capsys, monkeypatch, "chat", "--model", str(tmp_path))
    assert (code, out) == (2, "")
    assert "contains no chat template" in err.splitlines()[-1]


def test_chat_tells_a_story_of_its_own_to_ask_about(capsys, monkeypatch):
    from minipaged.evaluation.stories import tell

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
        (["juggle"], "No such command 'juggle'"),
        (["demo", "--block-size", "large"], "'--block-size'"),
        (["demo", "--block-size", "0"], "--block-size is 0"),
        (["demo", "--num-blocks", "9"], "--num-blocks is 9, but the longest story"),
        (["demo", "--num-blocks", "10000000"], "the machine has"),
        (["generate", "-"], "standard input contains no prompt"),
        (["generate", "once upon a time", "--num-blocks", "0"], "--num-blocks is 0"),
        (["demo", "--trace", "."], "trace is '.', a folder"),
        (
            ["demo", "--attention-backend", "magic"],
            "--attention-backend is 'magic'",
        ),
        (["demo", "--preemption", "never"], "preemption is 'never'"),
        (
            ["demo", "--trace", "no/such/folder/t"],
            "trace is 'no/such/folder/t', which cannot be",
        ),
        (["generate", "hi", "--model", "nowhere"], "no folder 'nowhere'"),
        (["generate", "hi", "--temperature", "-1"], "temperature is -1"),
        (["generate"], "Missing argument"),
    ],
)
def test_a_user_error_is_one_sentence_and_exit_code_2(capsys, monkeypatch, arguments, sentence):
    code, out, err = minipaged(capsys, monkeypatch, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("minipaged: ")]
    assert code == 2
    assert out == "" or (arguments[0] == "demo" and out.startswith("Eight stories of"))
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "Traceback" not in err


def test_no_command_prints_the_help(capsys, monkeypatch):
    code, out, err = minipaged(capsys, monkeypatch)
    assert (code, err) == (0, "")
    assert "Commands:" in out


def test_a_trace_can_go_to_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = f"cat {pipe} & {sys.executable} -m minipaged generate Once --max-tokens 2 --json"
    shell = ["bash", "-c", f"{command} --trace {pipe}; wait"]
    result = subprocess.run(shell, capture_output=True, text=True, check=True)
    kinds = {json.loads(line).get("event", "output") for line in result.stdout.splitlines()}
    assert {"admit", "schedule", "free", "output"} <= kinds
    assert pipe.is_fifo()


def test_text_cut_short_by_lack_of_memory_is_marked(capsys, monkeypatch):
    code, _, err = minipaged(
        capsys, monkeypatch, "generate", "Once upon a time", "--num-blocks", "2", "--ignore-eos"
    )
    assert code == 0
    assert "'Once upon a time' ended after 29 of 64 tokens" in err


def test_generated_text_is_not_broken_into_lines(capsys, monkeypatch):
    prompt = "Theo the frog put the white key in the meadow. " * 5
    _, out, _ = minipaged(capsys, monkeypatch, "generate", prompt, "--max-tokens", "1")
    assert out.startswith(prompt)


def test_a_letter_that_the_terminal_cannot_show_becomes_a_question_mark():
    result = subprocess.run(
        [sys.executable, "-m", "minipaged", "generate", "Wörld", "--max-tokens", "1"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0
    assert b"W?rld" in result.stdout


def test_a_model_without_a_tokenizer_is_reported(capsys, monkeypatch, tmp_path):
    folder = make_checkpoint("gpt2", tmp_path)
    code, _, err = minipaged(capsys, monkeypatch, "generate", "hi", "--model", str(folder))
    assert code == 2
    assert "contains no tokenizer" in err


def test_the_version_is_printed(capsys, monkeypatch):
    from minipaged import __version__

    code, out, _ = minipaged(capsys, monkeypatch, "--version")
    assert (code, out) == (0, f"minipaged {__version__}\n")


@pytest.mark.parametrize("group", ["lab", "trace", "bench", "soak"])
def test_a_group_without_a_command_lists_its_commands(capsys, monkeypatch, group):
    code, out, err = minipaged(capsys, monkeypatch, group)
    assert (code, err) == (0, "")
    assert "\nCommands:\n" in out


def test_python_dash_m_runs_the_same_program():
    result = subprocess.run(
        [sys.executable, "-m", "minipaged", "juggle"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert result.returncode == 2
    assert result.stderr == "minipaged: No such command 'juggle'.\n"


def test_the_script_in_the_root_is_the_fetch_command(tmp_path):
    script = Path(__file__).parents[2] / "model_weights_fetch.py"
    home = {**os.environ, "MINIPAGED_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    command = [sys.executable, str(script), "--list"]
    result = subprocess.run(command, env=home, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fetch", "someone/a-model"], "could not be reached"),
        (["fetch", "no name"], "is not a model name"),
        (["fetch"], "no model was given"),
        (["convert", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_an_impossible_fetch_is_one_sentence_and_exit_code_2(
    arguments, sentence, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("MINIPAGED_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where no server listens
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    code, out, err = minipaged(capsys, monkeypatch, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("minipaged: ")
    assert sentence in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("fetch --list someone/model", "--list fetches nothing, so name would be ignored"),
        ("fetch --list --revision a --dir b", "so --revision and --dir would be ignored: leave th"),
        ("path --trace --markdown x", "--trace cannot print Markdown: leave out --trace or"),
        ("lab challenge --name Ada", "--name appears only in a leaderboard"),
        ("bench step --quick --context-len 9999", "--context-len is 9999, above this model's 8128"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments, sentence, capsys, monkeypatch):
    code, out, err = minipaged(capsys, monkeypatch, *arguments.split())
    assert (code, out) == (2, "")
    assert re.search(sentence, err)
    assert err.count("\n") == 1
