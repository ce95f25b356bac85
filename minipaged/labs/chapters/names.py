"""Where a dotted name is defined. Files are parsed, never imported.

So a page needs no torch to be built, and a decorated function (a Triton kernel, a property) has the
lines that a reader sees in the file.
"""

import ast
import textwrap
from dataclasses import dataclass
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class NameIsGone(LookupError):
    """Nothing in the repository has this name."""


@dataclass(frozen=True)
class Source:
    """The lines `first` to `last` of a file, decorators included; all of them for a module."""

    name: str  # as its file calls it (BlockAllocator.free); a module's whole name
    path: str  # from the repository's root, with slashes
    first: int
    last: int
    text: str
    is_module: bool


def find(root: Path, dotted: str) -> Source:
    """Raises NameIsGone."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        module = root.joinpath(*parts[:length])
        for path in (module.with_suffix(".py"), module / "__init__.py"):
            if path.is_file():
                return _find_in(root, path, parts[length:], dotted)
    raise NameIsGone(f"{dotted}: no such module")


def _find_in(root: Path, path: Path, names: list[str], dotted: str) -> Source:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    relative = path.relative_to(root).as_posix()
    if not names:
        return Source(dotted, relative, 1, len(lines), text, is_module=True)
    tree = ast.parse(text)
    node: ast.AST = tree
    for name in names:
        below = _child(node, name)
        if below is None:
            exported = _imported_from(tree, name) if node is tree else None
            if exported is not None:
                return find(root, ".".join([exported, *names[1:]]))
            raise NameIsGone(f"{dotted}: {relative} defines no {'.'.join(names)}")
        node = below
    first, last = _first_line(node), getattr(node, "end_lineno", 0)
    block = textwrap.dedent("\n".join(lines[first - 1 : last]) + "\n")
    return Source(".".join(names), relative, first, last, block, is_module=False)


def _child(node: ast.AST, name: str) -> ast.AST | None:
    """The last definition of `name` directly in a module, class or function, which is in force."""
    found = None
    for child in _statements(node):
        if (isinstance(child, Definition) and child.name == name) or name in _assigned(child):
            found = child
    return found


def _statements(node: ast.AST) -> list[ast.stmt]:
    """The body of a node, with the statements inside `if`, `try` and `with`."""
    statements: list[ast.stmt] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With):
            statements += _statements(child)
        elif isinstance(child, ast.stmt):
            statements.append(child)
    return statements


def _assigned(node: ast.stmt) -> set[str]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _imported_from(tree: ast.Module, name: str) -> str | None:
    """`minipaged.LLM` is defined in minipaged.llm: the name that an import gives it there."""
    for node in _statements(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{alias.name}"
    return None


def _first_line(node: ast.AST) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([getattr(node, "lineno", 1), *(decorator.lineno for decorator in decorators)])
