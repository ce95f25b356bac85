"""What README claims is run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import minipaged

from minipaged.evaluation.reading_path import READING_PATH, lines_of_code

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "minipaged" / "assets").rglob("*.md"))
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_answers_the_question(capsys):
    [example] = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith(" In the meadow.\n")


def test_the_demo_prints_what_readme_shows(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = minipaged(capsys, monkeypatch, "demo")
    [shown] = blocks("text")
    for line in shown.splitlines():
        assert line == "..." or f"\n{line}" in out, line


def test_the_example_of_preemption_preempts(tmp_path):
    [command] = [block for block in blocks("sh") if "--preemption" in block]
    program = command.replace("minipaged ", f"{shlex.quote(sys.executable)} -m minipaged ")
    shell = f"{program.strip()} --no-open --output run.html"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    events = (tmp_path / "run.jsonl").read_text()
    assert '"event": "swap_out"' in events
    assert '"event": "swap_in"' in events
    assert (tmp_path / "run.html").is_file()


def test_the_size_of_the_core_is_the_reading_path():
    assert f"{len(READING_PATH)} files with at most 4,000 lines of code" in README
    assert sum(lines_of_code(file) for file, _ in READING_PATH) <= 4000


def test_readme_has_two_commands_that_install_and_at_most_700_words():
    assert len(re.findall("^pip install ", README, re.MULTILINE)) == 2
    assert len(README.split()) <= 700


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_into_the_repository_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)\)", text):  # code has brackets of its own
        if not target.startswith("http"):
            made = ROOT / "tutorials" / f"{Path(target).stem}.py"  # the page of a chapter
            is_chapter = Path(target).parent.name == "tutorials" and made.exists()
            is_list = target.endswith(("tutorials/index.md", "tutorials/labs/index.md"))
            is_brief = "tutorials/labs/" in target and (ROOT / target).exists()
            assert is_chapter or is_list or is_brief or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_the_repository_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:docs|minipaged|tests|tutorials)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_every_test_that_a_page_cites_exists():
    cited = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\|", "|")
        cited |= set(re.findall(r"`(?:tests/)?(test_\w+\.py::test_\w+(?:\[[^\]]+\])?)`", text))
    assert len(cited) > 15
    names = {name.partition("::")[0] for name in cited}
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path.name in names]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *files]
    command.append("--full")
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    known = {re.sub(r"^\S*/", "", line) for line in listed.splitlines()}
    known |= {name.partition("[")[0] for name in known}
    assert cited <= known, cited - known
