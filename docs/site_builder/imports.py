"""Which files a script can import, found without running it: what its outputs can come from.

It follows imports anywhere in a file, also within functions; names that a package imports when they
are first used (`__getattr__` with a table from name to module); and dotted names in strings, as
tables of parts have them and programs that are run in another process. In the script itself, every
dotted name counts. When in doubt it names a file too many: outputs must never be stale.
"""

import ast
import hashlib
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path


def fingerprint(scripts: Iterable[Path], data: Iterable[Path], root: Path) -> str:
    """Changes with the scripts, with what they can import, with these data, and with nothing else.

    Of other libraries the versions count.
    """
    files: set[Path] = set()
    elsewhere: set[str] = set()
    for script in scripts:
        imported, modules = imported_files(script, root)
        files |= {script, *imported}
        elsewhere |= modules
    key = hashlib.sha256("; ".join(_versions(elsewhere)).encode())
    for path in sorted({*files, *data}):
        content = path.read_bytes()
        key.update(f"{path.name} {len(content)} ".encode() + content)
    return key.hexdigest()[:16]


def imported_files(script: Path, root: Path) -> tuple[set[Path], set[str]]:
    """Files below `root` and next to the script, and the names of all other modules."""
    search = _Search((root, script.parent, script.parent.parent))
    search.read(script)
    for dotted in _dotted_names(script.read_text(encoding="utf-8")):
        search.refer(dotted)
    return search.files - {script}, search.elsewhere


def _versions(modules: set[str]) -> list[str]:
    """Of the installed distributions that these modules belong to, and of Python."""
    installed = _distributions()
    names = {name for module in modules for name in installed.get(module, ())}
    return [f"python {sys.version}", *sorted(f"{name} {version(name)}" for name in names)]


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


class _Search:
    """Follows references from file to file."""

    def __init__(self, bases: tuple[Path, ...]) -> None:
        self.files: set[Path] = set()
        self.elsewhere: set[str] = set()
        self._bases = bases

    def read(self, file: Path) -> None:
        """Take in a file, and all that it refers to."""
        if file in self.files:
            return
        self.files.add(file)
        for dotted in _references(file.read_text(encoding="utf-8")):
            self.refer(dotted)

    def refer(self, dotted: str) -> None:
        """Take in what a dotted name leads to; `a.b.*` is all of a package."""
        parts = dotted.split(".")
        place = next((base for base in self._bases if _module(base / parts[0])), None)
        if place is None:
            self.elsewhere.add(parts[0])
            return
        for number, part in enumerate(parts):
            module = _module(place / part)
            if module is None:
                self._refer_within(place, parts[:number], part)
                return
            self.read(module)
            place = place / part

    def _refer_within(self, package: Path, names: list[str], name: str) -> None:
        """`package.name` is no module: it may be imported by the package when it is first used."""
        file = _module(package)
        if file is None or file.name != "__init__.py":
            return
        homes = _lazy_names(file.read_text(encoding="utf-8"))
        if homes is not None and name in homes:
            self.refer(".".join([*names, homes[name]]))
        elif name == "*" or (homes is not None and not name.startswith("__")):
            for module in package.rglob("*.py"):
                self.read(module)


def _module(path: Path) -> Path | None:
    """The file of a module or of a package."""
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


_DOTTED = re.compile(r"\bminipaged(?:\.\w+)+")


def _dotted_names(text: str) -> list[str]:
    """Everything in a text that looks like a name of the library."""
    return _DOTTED.findall(text)


@cache
def _references(source: str) -> set[str]:
    """The dotted names of all imports, and those in strings that are no docstrings."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            children = list[ast.AST](node.orelse)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.update(_dotted_names(_chain(node)))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            children = []  # a docstring
        elif isinstance(node, ast.JoinedStr):
            texts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            # f"minipaged.figures.{name}": which of them is known only when it runs.
            found |= {f"{text}*" for text in map(str, texts) if _OPEN.fullmatch(text)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(_dotted_names(node.value))
        pending += children
    return found


_OPEN = re.compile(rf"{_DOTTED.pattern}\.")


def _chain(node: ast.expr) -> str:
    """a.b.c, of names only."""
    if isinstance(node, ast.Attribute):
        return f"{_chain(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@cache
def _lazy_names(source: str) -> dict[str, str] | None:
    """What a package imports when it is asked for: name -> module. None: it does not do so."""
    body = ast.parse(source).body
    if not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in body):
        return None
    tables = [node.value for node in body if isinstance(node, ast.Assign)]
    return {
        str(key.value): str(value.value)
        for table in tables
        if isinstance(table, ast.Dict)
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    }
