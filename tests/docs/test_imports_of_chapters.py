"""A chapter's outputs are kept until something changes that it can import, and until then only."""

from pathlib import Path

import pytest
from site_builder.imports import fingerprint

CHAPTER = """\
# %% [markdown]
# # The first chapter
#
# @@ minipaged.quoted.SIZE

# %%
import drawing

from minipaged import LLM


def later():
    from minipaged.in_a_function import size
"""
FILES = {
    "minipaged/__init__.py": '''\
"""A library: see minipaged.unused."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minipaged.llm import LLM
    from minipaged.other import Other

_HOMES = {"LLM": "llm", "Other": "other"}


def __getattr__(name):
    return getattr(import_module(f"minipaged.{_HOMES[name]}"), name)
''',
    "minipaged/llm.py": """\
from minipaged.memory import Pool

PARTS = {"allocator": "minipaged.named_in_a_table.allocate"}


def draw(name):
    return import_module(f"minipaged.figures.{name}")
""",
    "minipaged/memory/__init__.py": "from minipaged.memory.pool import Pool",
    "minipaged/memory/pool.py": "import minipaged.transitive",
    "minipaged/figures/__init__.py": "",
    "minipaged/figures/fig1.py": "",
    "minipaged/assets/weights.txt": "1 2 3",
    "tutorials/00_first.py": CHAPTER,
    "tutorials/01_second.py": "",
    "tutorials/drawing.py": "",
}
EMPTY = "in_a_function named_in_a_table other quoted transitive unused memory/unused".split()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILES.items() | {(f"minipaged/{name}.py", "") for name in EMPTY}:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return tmp_path


def key(project: Path) -> str:
    data = [project / "minipaged" / "assets" / "weights.txt"]
    return fingerprint([project / "tutorials" / "00_first.py"], data, project)


@pytest.mark.parametrize(
    "file",
    [
        "tutorials/00_first.py",
        "tutorials/drawing.py",
        "minipaged/__init__.py",
        "minipaged/llm.py",  # of which only the table of minipaged/__init__.py knows
        "minipaged/memory/__init__.py",
        "minipaged/memory/pool.py",
        "minipaged/transitive.py",
        "minipaged/in_a_function.py",
        "minipaged/named_in_a_table.py",
        "minipaged/figures/fig1.py",
        "minipaged/quoted.py",
        "minipaged/assets/weights.txt",
    ],
)
def test_a_change_in_an_importable_module_changes_the_key(project, file):
    before = key(project)
    assert key(project) == before
    (project / file).write_text(f"{FILES.get(file, '')}\n# changed\n", encoding="utf-8")
    assert key(project) != before


UNUSED = ["other", "unused", "memory/unused"]


@pytest.mark.parametrize(
    "file", ["tutorials/01_second.py", *(f"minipaged/{name}.py" for name in UNUSED)]
)
def test_a_change_elsewhere_does_not_change_the_key(project, file):
    before = key(project)
    (project / file).write_text("# changed\n", encoding="utf-8")
    assert key(project) == before


def test_a_new_module_changes_the_key(project):
    file = project / "minipaged" / "figures" / "fig2.py"
    before = key(project)
    file.touch()
    assert key(project) != before


def test_the_versions_of_other_libraries_are_part_of_the_key(project, monkeypatch):
    (project / "tutorials" / "drawing.py").write_text("import pytest\n")
    before = key(project)
    monkeypatch.setattr("site_builder.imports.version", lambda name: "0.0")
    assert key(project) != before
