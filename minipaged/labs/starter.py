"""Generates a student's file: the library's own source, without the bodies to write.

Signatures, docstrings, comments and all other methods are the library's lines, so a starter cannot
drift from it. Other names are imported, never copied: a copied OutOfBlocks would be a different
exception from the one that the tests expect.
"""

import ast
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from minipaged.labs.lab import Lab
from minipaged.utils.counts import counted

Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class _Source:
    """One class or function of the library that a starter contains."""

    module: str  # its name
    lines: list[str]  # of the whole module
    tree: ast.Module
    node: Definition

    @property
    def names(self) -> set[str]:
        """All names that it uses."""
        nodes = ast.walk(self.node)
        return {node.id for node in nodes if isinstance(node, ast.Name)} | _quoted(self.node)


def starter(lab: Lab) -> str:
    """The text of the starter file."""
    sources = [_find(dotted) for dotted in lab.sources]
    holes = set(lab.holes)
    bodies = [_with_holes(source, holes) for source in sources]
    assert not holes, f"lab {lab.number} has no {', '.join(sorted(holes))} to take out"
    return "\n\n\n".join([f"{_heading(lab)}\n\n{_imports(sources)}", *bodies]) + "\n"


def library_text(lab: Lab) -> str:
    """The same file with the library's own bodies."""
    sources = [_find(dotted) for dotted in lab.sources]
    bodies = [_with_holes(source, set()) for source in sources]
    return "\n\n\n".join([f"{_heading(lab)}\n\n{_imports(sources)}", *bodies]) + "\n"


def _find(dotted: str) -> _Source:
    module_name, _, name = dotted.rpartition(".")
    spec = find_spec(module_name)  # it is read, not imported: a dependency may be missing
    assert spec is not None, f"there is no {module_name}"
    text = Path(spec.origin or "").read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = [n for n in tree.body if isinstance(n, Definition) and n.name == name]
    assert found, f"{module_name} defines no {name}"
    return _Source(module_name, text.splitlines(), tree, found[-1])


def _heading(lab: Lab) -> str:
    tasks = "\n".join(
        f"    task {task.number} ({counted(task.points, 'point')}): {task.title}"
        for task in lab.tasks
    )
    return f'''"""Lab {lab.number}: {lab.title}.

{tasks}

Implement each function marked "your turn". Then run: minipaged lab check {lab.number}
"""'''


def _with_holes(source: _Source, holes: set[str]) -> str:
    """The source's own lines without the bodies to write, whose names are removed from `holes`."""
    node = source.node
    functions = [node] if isinstance(node, ast.FunctionDef) else _methods(node)
    lines = source.lines.copy()
    last = node.end_lineno or node.lineno
    for function in sorted(functions, key=lambda f: -f.lineno):  # bottom up: numbers stay valid
        name = function.name if function is node else f"{node.name}.{function.name}"
        if name not in holes:
            continue
        holes.remove(name)
        has_docstring = ast.get_docstring(function) is not None
        first = function.body[1 if has_docstring else 0].lineno
        if has_docstring:  # comments before the first statement may describe the solution
            first = (function.body[0].end_lineno or 0) + 1
        end = function.end_lineno or first
        todo = " " * function.body[0].col_offset + f'raise NotImplementedError("your turn: {name}")'
        lines[first - 1 : end] = [todo]
        last -= end - first
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(lines[start - 1 : last])


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [child for child in node.body if isinstance(child, ast.FunctionDef)]


def _imports(sources: list[_Source]) -> str:
    """The imports for the classes: those of their modules, and other names of these modules."""
    ours = {source.node.name for source in sources}
    whole: set[str] = set()
    members: dict[str, set[str]] = {}  # of each module
    for source in sources:
        used = source.names - ours
        members.setdefault(source.module, set()).update(_defined_in(source.tree) & used)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                wanted = [a for a in node.names if (a.asname or a.name).split(".")[0] in used]
                names = {ast.unparse(alias) for alias in wanted}
                if isinstance(node, ast.Import):
                    whole.update(f"import {name}" for name in names)
                else:
                    members.setdefault(node.module or "", set()).update(names)
    parts = {f"from {m} import {', '.join(sorted(names))}" for m, names in members.items() if names}
    return "\n".join(sorted(whole | parts, key=_import_order))


def _import_order(line: str) -> tuple[bool, bool, str]:
    """The sort key: minipaged's imports last; among the others, whole modules first."""
    return "minipaged" in line, line.startswith("from "), line


def _defined_in(tree: ast.Module) -> set[str]:
    """The names that a module defines at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, Definition):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def _quoted(node: ast.AST) -> set[str]:
    """Names in annotations that are strings, as "Memory"."""
    strings = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    return {text for text in strings if isinstance(text, str) and text.isidentifier()}
