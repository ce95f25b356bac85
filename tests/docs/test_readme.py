"""What README promises is run, not believed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_example_of_preemption_preempts(tmp_path):
    [command] = [block for block in blocks("sh") if "--preemption" in block]
    trace = tmp_path / "trace.jsonl"
    program = command.replace("minipaged", f"{shlex.quote(sys.executable)} -m minipaged", 1)
    shell = f"{program.strip()} --trace {shlex.quote(str(trace))}"
    subprocess.run(["bash", "-c", shell], cwd=ROOT, check=True, capture_output=True)
    events = trace.read_text()
    assert '"event": "swap_out"' in events
    assert '"event": "swap_in"' in events


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
