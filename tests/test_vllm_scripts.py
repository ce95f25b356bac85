"""Scripts written for vLLM's offline interface run here with only their import lines changed."""

import re
import sys
from pathlib import Path

import pytest

import minipaged

SCRIPTS = sorted((Path(__file__).parent / "vllm_scripts").glob("*.py"))
MODEL = Path(minipaged.__file__).parent / "assets" / "storyteller"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_written_for_vllm_runs_with_only_its_import_changed(script, monkeypatch):
    text = script.read_text(encoding="utf-8")
    changed, count = re.subn(r"^(from|import) vllm\b", r"\1 minipaged", text, flags=re.M)
    assert count >= 1
    assert "minipaged" not in text
    monkeypatch.setattr(sys, "argv", [script.name, str(MODEL)])
    exec(compile(changed, script, "exec"), {"__name__": "__main__"})


def test_there_are_twelve_scripts_and_each_is_in_the_table():
    page = Path(minipaged.__file__).parents[1] / "docs" / "from_here_to_vllm.md"
    [section] = re.findall(
        r"^## Scripts written for vLLM\n(.*?)^## ", page.read_text("utf-8"), re.M | re.S
    )
    rows = re.findall(
        r"^\| (.+) \| (same|differs|absent)([^|]*) \| (?:`(\w+)` )?\|$", section, re.M
    )
    assert len(rows) == section.count("\n|") - 2
    named = {script for *_, script in rows if script}
    tests = {test.stem for test in Path(__file__).parent.rglob("test_*.py")}
    assert all(script for *_, script in rows), "each row names the script that tries it"
    assert named - tests == {script.stem for script in SCRIPTS}
    assert len(SCRIPTS) == 12


@pytest.mark.parametrize(
    "name", ["enqueue", "wait_for_completion", "collective_rpc", "apply_model", "sleep"]
)
def test_the_features_that_the_table_calls_absent_are_absent(name):
    assert not hasattr(minipaged.LLM, name)
