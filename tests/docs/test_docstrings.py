"""What docstrings and comments name exists: arguments, attributes, functions of the library."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "minipaged"
TEXTS = {file: file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
DOCSTRING = re.compile(r'"{3}(.*?)"{3}', re.S)
COMMENT = re.compile(r"#[^\n]*")
OF_TRANSFORMERS = {"generate_batch", "modeling_rope_utils"}


def words_of_code(text: str) -> set[str]:
    return set(re.findall(r"\w+", COMMENT.sub("", DOCSTRING.sub("", text))))


def missing_names(text: str, names: set[str]) -> list[str]:
    """The names in backticks, such as `a` or `a.b()`, of which a part is not among these."""
    prose = "\n".join([*DOCSTRING.findall(text), *COMMENT.findall(text)])
    quoted = re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", prose)
    return [name for name in quoted if not names.issuperset(re.findall(r"[A-Za-z_]\w*", name))]


def listed(docstring: str, section: str) -> Iterator[str]:
    """The names that a section such as "Args:" explains."""
    for block in re.findall(rf"^{section}:\n((?:    .*\n|\n)+)", docstring + "\n", re.M):
        for names in re.findall(r"^    ([*\w]+(?:, [*\w]+)*):", block, re.M):
            yield from (name.lstrip("*") for name in names.split(", "))


def parameters(node: ast.AST) -> set[str]:
    """The parameters of a function; of a class, those of its constructor."""
    if isinstance(node, ast.ClassDef):
        fields = {
            line.target.id
            for line in node.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        }
        return fields.union(
            *(parameters(line) for line in node.body if getattr(line, "name", "") == "__init__")
        )
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}


def wrong_sections(text: str) -> list[str]:
    """The names that sections of docstrings explain and that are not there."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node) or ""
            missing = set(listed(docstring, "Args")) - parameters(node)
            if isinstance(node, ast.ClassDef):
                words = words_of_code(ast.get_source_segment(text, node) or "")
                missing |= set(listed(docstring, "Attributes")) - words
            found += [f"{node.name}: {name}" for name in sorted(missing)]
    return found


def split_strings(text: str) -> list[str]:
    """Docstrings with quotes at the end of a line and at the beginning of the next one."""
    return [docstring for docstring in DOCSTRING.findall(text) if re.search(r'"\n\s*"', docstring)]


@pytest.fixture(scope="module")
def names() -> set[str]:
    return OF_TRANSFORMERS.union(*(words_of_code(text) for text in TEXTS.values()))


def test_every_quoted_name_exists(names):
    found = {str(file): missing_names(text, names) for file, text in TEXTS.items()}
    assert not {file: missing for file, missing in found.items() if missing}


def test_every_explained_argument_and_attribute_exists():
    found = {str(file): wrong_sections(text) for file, text in TEXTS.items()}
    assert not {file: wrong for file, wrong in found.items() if wrong}


def test_no_docstring_is_written_as_several_strings():
    assert not [file for file, text in TEXTS.items() if split_strings(text)]


FAULTY = '''
class Pool:
    """A pool.

    Args:
        num_blocks: how many.
        gone: never passed.

    Attributes:
        lost: never set.
    """

    def __init__(self, num_blocks):
        """Makes one of `num_blocks`, as `absent` does, "
        "and splits a line."""
'''


def test_a_faulty_docstring_is_found():
    assert wrong_sections(FAULTY) == ["Pool: gone", "Pool: lost"]
    assert missing_names(FAULTY, words_of_code(FAULTY)) == ["absent"]
    assert len(split_strings(FAULTY)) == 1
