"""Checks whether a solution is the student's own: its imports, and the origin of its code.

Findings are reported to student and teacher and cost no points: a subclass of the library's class
may be an honest experiment.
"""

import ast
import inspect
import sys
from pathlib import Path
from types import CodeType
from typing import Any

from minipaged.labs.lab import Lab
from minipaged.labs.starter import library_text

LONGEST_FILE = 2**20  # bytes, the largest solution
ALIKE = 10  # statements; shorter bodies may be equal by chance
_LOOKS_UP = {"import_module", "__import__", "getsource", "resolve_name", "exec", "eval"}


# ---- by its text, outside the student's process --------------------------------------------------


def read_notes(lab: Lab, text: str) -> list[str]:
    """One sentence for each thing that a solution takes from the library."""
    try:
        tree = ast.parse(text)
        library = ast.parse(library_text(lab))
        return [*_imported(lab, tree), *_looked_up(tree), *_copied(lab, tree, library)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # the tests will report the error


def _imported(lab: Lab, tree: ast.Module) -> list[str]:
    names = {source.rpartition(".")[2] for source in lab.sources}
    modules = {source.rpartition(".")[0] for source in lab.sources}
    found: dict[str, int] = {}  # by name, the line
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name: node.lineno for a in node.names if a.name in modules}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minipaged"):
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                is_all = alias.name == "*" and _may_bring(node.module or "", modules)
                if alias.name in names or dotted in modules or is_all:
                    found[dotted] = node.lineno
        elif isinstance(node, ast.Attribute) and node.attr in names:
            dotted = ast.unparse(node)
            if dotted.startswith("minipaged."):
                found[dotted] = node.lineno
    return [
        f"line {line} imports {name} from the library, which the student should write in this lab."
        for name, line in found.items()
    ]


def _may_bring(module: str, modules: set[str]) -> bool:
    return any(each == module or each.startswith(module + ".") for each in modules)


def _looked_up(tree: ast.Module) -> list[str]:
    notes: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in _LOOKS_UP:
                notes.append(f"line {node.lineno}: `{name}` looks up code at run time.")
    return notes[:3]


def _copied(lab: Lab, tree: ast.Module, library: ast.Module) -> list[str]:
    theirs, ours = _bodies(tree), _bodies(library)
    same = [hole for hole in lab.holes if hole in theirs and theirs[hole] == ours.get(hole)]
    if sum(theirs[hole][1] for hole in same) < ALIKE:
        return []
    return [f"{', '.join(same)}: identical to the library's text."]


def _bodies(tree: ast.Module) -> dict[str, tuple[str, int]]:
    """Map "Class.method" or "function" to its statements without docstring, and their number."""
    found: dict[str, tuple[str, int]] = {}
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for each in members:
            if isinstance(each, ast.FunctionDef):
                name = f"{node.name}.{each.name}" if isinstance(node, ast.ClassDef) else each.name
                body = each.body[ast.get_docstring(each) is not None :]
                num = sum(isinstance(n, ast.stmt) for one in body for n in ast.walk(one))
                found[name] = ("\n".join(map(ast.dump, body)), num)
    return found


# ---- by what is run, in the student's process ----------------------------------------------------


def not_their_own(holes: list[str]) -> list[str]:
    """The required bodies whose code is not in the student's file, as sentences."""
    notes: list[str] = []
    for name, module in list(sys.modules.items()):
        if name.startswith("minipaged_custom_"):
            for hole in holes:
                code = _code(module, hole)
                if code is not None and code.co_filename != module.__file__:
                    place = Path(code.co_filename)
                    notes.append(f"{hole} is not written in the file: it is that of {place.name}.")
    return notes


def _code(module: Any, hole: str) -> CodeType | None:
    value: Any = module
    for name in hole.split("."):
        value = inspect.getattr_static(value, name, None)
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else value
    value = getattr(value, "fn", value)  # a Triton kernel
    return getattr(value, "__code__", None)
