"""Every chapter runs as it is, keeps its form, and copies nothing out of the library."""

import ast
import functools
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from site_builder.imports import imported_files

from minipaged.labs.catalogue import LABS

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.py"))
NAMES = (
    "00_first_run 01_attention_and_the_kv_cache 02_the_memory_problem 03_blocks_and_block_tables "
    "04_paged_attention 05_models_on_pages 06_continuous_batching 07_sharing 08_prefix_caching "
    "09_when_memory_runs_out 10_a_first_kernel 11_to_the_speed_of_light 12_one_tokens_journey "
    "13_one_request_through_the_server 14_cut_a_model_in_two"
).split()
FORM = (
    "Goals",
    "Invariants",
    "Predict",
    "Build it",
    "Check",
    "Questions",
    "Results",
)

IMPORT = re.compile(r"^import time: .*\| +(\S+)\n", flags=re.MULTILINE)

pytest.importorskip("matplotlib", reason="the chapters draw: pip install 'minipaged[plot]'")
# By default two chapters run; all of them in the full set.
RUN = [
    pytest.param(
        path, id=path.stem, marks=[] if path.stem[:2] in ("00", "04") else pytest.mark.full
    )
    for path in CHAPTERS
]
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


def markdown(chapter: Path) -> str:
    """The text of a chapter, without its code."""
    cells = re.split(r"^# %%", chapter.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = [cell.split("\n", 1)[1] for cell in cells if cell.startswith(" [markdown]")]
    return re.sub(r"^# ?", "", "\n".join(texts), flags=re.MULTILINE)


def test_all_chapters_are_there():
    assert [chapter.stem for chapter in CHAPTERS] == NAMES


@pytest.mark.parametrize("chapter", RUN)
def test_a_chapter_runs_from_top_to_bottom(chapter: Path, tmp_path: Path):
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "Agg"}
    for name in ("TRITON_INTERPRET", "MINIPAGED_PICTURES"):  # as a reader has it
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-X", "importtime", chapter], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    times = IMPORT.findall(run.stderr)
    said = IMPORT.sub("", run.stderr)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{said[-4000:]}"
    assert not list(tmp_path.iterdir()), "a chapter leaves files in its folder"
    assert run.stdout.endswith(f": minipaged learn {int(chapter.stem[:2])}.\n")
    known = {module_name(file) for file in imported_files(chapter, ROOT)[0]}
    imported = {name for name in times if name.split(".")[0] in ("minipaged", "drawing")}
    assert "drawing" in imported
    assert imported <= known, "the site would not run it again if these changed"


def module_name(file: Path) -> str:
    below = ROOT if file.is_relative_to(ROOT / "minipaged") else file.parent
    return ".".join(file.relative_to(below).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.full
def test_a_script_writes_its_pictures_to_the_given_folder(tmp_path: Path):
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "MINIPAGED_PICTURES": "pictures"}
    subprocess.run(
        [sys.executable, CHAPTERS[0]], cwd=tmp_path, env=environment, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert [file.name for file in tmp_path.glob("pictures/*")] == ["00_first_run-1.png"]


@pytest.mark.parametrize(
    ("name", "code", "last"),
    [
        (
            "03_stub.py",
            "print(1)",
            "Read this chapter with its text and pictures: minipaged learn 3.",
        ),
        ("03_stub.py", "drawing.picture()", "learn 3. Its pictures are in pictures."),
        ("03_stub.py", "1 / 0", ""),
        ("stub.py", "print(1)", "1"),
    ],
)
def test_a_script_ends_with_where_to_read_it_unless_it_failed(name, code, last, tmp_path):
    shutil.copy(ROOT / "tutorials" / "drawing.py", tmp_path)
    (tmp_path / name).write_text(f"import drawing\n{code}\n")
    environment = {k: v for k, v in os.environ.items() if k != "MINIPAGED_PICTURES"}
    if "pictures." in last:
        environment["MINIPAGED_PICTURES"] = "pictures"
    run = subprocess.run(
        [sys.executable, name], cwd=tmp_path, env=environment, check=False, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.stdout.rstrip("\n").endswith(last)
    assert bool(run.stdout) == bool(last)
    assert (tmp_path / "pictures").exists() == ("pictures." in last)


@pytest.mark.full
@pytest.mark.parametrize(
    "chapter",
    [each for each in CHAPTERS if "### Exercise" in markdown(each)],
    ids=lambda path: path.stem,
)
def test_an_exercise_is_open_until_its_solution_is_in_place(chapter: Path, tmp_path: Path):
    _, folded = markdown(chapter).split("<summary>Solution</summary>")
    [solution] = re.findall(
        r"^```python\n(.*?)^```", folded.split("</details>")[0], flags=re.M | re.S
    )
    script = tmp_path / chapter.name
    source = chapter.read_text(encoding="utf-8")
    [check] = re.findall(r"^print\(\"solved\" if .*\n", source, flags=re.MULTILINE)
    script.write_text(f"{source}\n{solution}\n{check}", encoding="utf-8")
    path = os.pathsep.join((str(ROOT / "tutorials"), str(ROOT)))
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, script], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    lines = run.stdout.splitlines()
    assert [line for line in lines if "solved" in line] == ["not solved yet", "solved"]


@each_chapter
def test_a_chapter_has_the_fixed_sections(chapter: Path):
    text = markdown(chapter)
    number = int(chapter.stem[:2])
    assert re.match(rf"# {number}\. \S.*\n\n\S", text), (
        "its number, its title, and what it is about"
    )
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    kinds = [heading.split(":")[0] for heading in headings]
    assert tuple(dict.fromkeys(kinds)) == FORM
    assert "Your predictions" in text, "predictions are compared with what came out"
    assert text.count("<details") == text.count("</details>") >= 4, "questions have folded answers"
    if number + 1 < len(NAMES):
        assert f"({NAMES[number + 1]}.md)" in text.rsplit("Next:", 1)[-1]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_lists_its_requirements_on_the_first_screen(chapter: Path):
    paragraphs = markdown(chapter).split("\n\n")
    facts = re.fullmatch(
        r"(?:\*\*Needs\*\* (?P<needs>.+) · )?\*\*Time\*\* \d+ minutes(?: · \*\*Lab\*\* \[.+)?",
        " ".join(paragraphs[2].split()),
    )
    assert facts, "after the title and the subject: needs, time in minutes, lab"
    needed = re.findall(r"\((\w+)\.md\)", facts["needs"] or "")
    assert all(name in NAMES[: int(chapter.stem[:2])] for name in needed)
    assert "### Exercise: " in markdown(chapter)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_folds_the_code_that_a_lab_removes(chapter: Path):
    holes = tuple(f".{hole}" for lab in LABS for hole in lab.holes)
    unfolded = re.sub(r"<details.*?</details>", "", markdown(chapter), flags=re.DOTALL)
    quoted = re.findall(r"^@@ (\S+)$", unfolded, flags=re.MULTILINE)
    assert not [name for name in quoted if name.endswith(holes)]


@each_chapter
def test_every_name_that_a_chapter_quotes_exists(chapter: Path):
    for name in re.findall(r"^@@ (\S+)$", markdown(chapter), flags=re.MULTILINE):
        assert pkgutil.resolve_name(name) is not None


def functions(source: str) -> dict[str, str]:
    """By name, the bodies of all functions of some length, without their docstrings."""
    bodies = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            lines = node.body[1:] if ast.get_docstring(node) else node.body
            if sum(1 for line in lines for _ in ast.walk(line) if isinstance(_, ast.stmt)) >= 6:
                bodies[node.name] = "\n".join(ast.dump(line) for line in lines)
    return bodies


@each_chapter
def test_a_chapter_copies_no_code_of_the_library(chapter: Path):
    library = functions_of_the_library()
    for name, body in functions(chapter.read_text(encoding="utf-8")).items():
        assert body not in library, f"{name} is {library[body]}: quote it by its name instead"


@functools.cache
def functions_of_the_library() -> dict[str, str]:
    return {
        body: f"{path.stem}.{name}"
        for path in (ROOT / "minipaged").rglob("*.py")
        for name, body in functions(path.read_text(encoding="utf-8")).items()
    }


@each_chapter
def test_every_picture_has_a_title(chapter: Path):
    cells = re.split(r"^# %%(.*)$", chapter.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for title, code in zip(cells[1::2], cells[2::2], strict=True):
        if "drawing.picture(" in code and "[markdown]" not in title:
            assert len(title.split()) >= 3, f"what does this picture show?\n{code[:200]}"
