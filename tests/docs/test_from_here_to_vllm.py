"""docs/from_here_to_vllm.md: each class of the reading path, each option, and no name unknown.

vLLM's own names are not checked here, because vLLM is not installed. They have one form, `file.py:
Name`, in which they can be looked up in its source.
"""

import ast
import re
from dataclasses import fields
from enum import Enum
from pathlib import Path

import pytest

from minipaged.config import EngineArgs
from minipaged.evaluation.reading_path import PACKAGE, READING_PATH
from minipaged.sampling import SamplingParams

PAGE = (PACKAGE.parent / "docs" / "from_here_to_vllm.md").read_text(encoding="utf-8")
QUOTE = re.compile(r"\{\{ name (minipaged\.[\w.]+) \}\}")
VLLM = re.compile(r"`([\w/]+\.py): ([\w.]+(?:, [\w.]+)*)`")
ENTRY = re.compile(r"^(\{\{ name .*)\n((?:[: ]   .+\n)+)", re.M)
OTHER_NAMES = {"None", "torch.compile", "transformers"}


def section(title: str) -> str:
    """The text below a heading, up to the next one of any level."""
    [body] = re.findall(rf"^##+ {title}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    return body


def rows(title: str) -> list[tuple[str, str, str]]:
    """The rows of a section's table: an option, its default, and the column "in vLLM"."""
    return re.findall(r"^\| `(\w+)` `([^`]*)`[^|]*\| (.+) \|$", section(title), re.M)


def members(dotted: str) -> set[str]:
    """Methods, fields and attributes of a class of the package; empty for a function."""
    parts = dotted.split(".")
    length = max(n for n in range(1, len(parts)) if _file(parts[:n]).is_file())
    node: ast.AST = ast.parse(_file(parts[:length]).read_text(encoding="utf-8"))
    for name in parts[length:]:
        node = next(
            each
            for each in ast.iter_child_nodes(node)
            if isinstance(each, ast.ClassDef | ast.FunctionDef) and each.name == name
        )
    if not isinstance(node, ast.ClassDef):
        return set()
    found = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
    for each in ast.walk(node):
        if isinstance(each, ast.AnnAssign | ast.Attribute):
            target = each.target if isinstance(each, ast.AnnAssign) else each
            found |= {target.attr} if isinstance(target, ast.Attribute) else set()
            found |= {target.id} if isinstance(target, ast.Name) else set()
    return found


def _file(parts: list[str]) -> Path:
    return PACKAGE.parent.joinpath(*parts).with_suffix(".py")


def test_every_class_of_the_reading_path_has_one_entry():
    listed = [name for terms, _ in ENTRY.findall(PAGE) for name in QUOTE.findall(terms)]
    assert len(listed) == len(set(listed))
    for file, _ in READING_PATH:
        module = ".".join(("minipaged", *Path(file).with_suffix("").parts))
        for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert f"{module}.{node.name}" in listed, f"{module}.{node.name} has no entry"


def test_every_entry_names_its_counterpart_or_says_that_there_is_none():
    entries = ENTRY.findall(PAGE)
    assert len(entries) == len(re.findall(r"^:   ", PAGE, re.M)) > 40
    for terms, text in entries:
        assert VLLM.search(text) or text.startswith(":   No counterpart"), terms


def test_every_name_on_the_page_is_quoted_or_has_a_file_of_vllm():
    quoted, vllm = set(QUOTE.findall(PAGE)), VLLM.findall(PAGE)
    known = {part for name in quoted for part in (name.rpartition(".")[2], *members(name))}
    known |= {part for _, names in vllm for name in names.split(", ") for part in name.split(".")}
    known |= {each.name for each in [*fields(EngineArgs), *fields(SamplingParams)]}
    text = re.sub(r"^\|.*$", "", PAGE, flags=re.M)  # the tables of options have tests of their own
    for name in set(re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)`", text)) - OTHER_NAMES:
        assert set(name.split(".")) <= known, f"`{name}` is in no quote and no file of vLLM"


def test_every_file_of_vllm_comes_with_a_name():
    assert len(re.findall(r"`[\w/]+\.py\b", PAGE)) == len(VLLM.findall(PAGE)) > 100


@pytest.mark.parametrize(
    ("title", "declared"),
    [("Options side by side", EngineArgs), ("SamplingParams", SamplingParams)],
    ids=["EngineArgs", "SamplingParams"],
)
def test_every_option_has_one_row_with_its_real_default(title, declared):
    table = rows(title)
    assert [row[:2] for row in table] == [
        (each.name, shown_default(each.default)) for each in fields(declared) if each.init
    ]
    for name, _, in_vllm in table:
        assert re.match(r"the same, `|none\b|`\w+` `", in_vllm), name


def shown_default(value: object) -> str:
    return str(value) if isinstance(value, Enum) else repr(value).replace("'", '"')


def test_the_page_lists_ten_absent_features_and_ten_files_to_read():
    absent = re.split(r"^\d+\. ", section("Ten things that are not here"), flags=re.M)[1:]
    assert len(absent) == 10
    assert all(VLLM.search(each) and "](https://" in each for each in absent)
    files = re.findall(r"^\d+\. `([\w/]+\.py): ", section("Where to begin reading vLLM"), re.M)
    assert len(files) == len(set(files)) == 10
