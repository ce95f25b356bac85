"""The drawing of the house, as assertions: imports look down, bookkeeping needs no tensors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from layers import LAB_TESTS, LAYERS, MODULES, PACKAGE

TESTS = Path(__file__).parent


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_at_run_time(path: Path) -> set[str]:
    """Names of all imported modules, but for those that only the type checker sees."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name instead of dots"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))
    return names


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_module_has_its_layer():
    assert {layer_of(path) for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_look_down(path: Path):
    own = LAYERS.index(layer_of(path))
    ours = {
        name.split(".")[1] for name in imported_at_run_time(path) if name.startswith("minipaged.")
    }
    above = {name for name in ours if LAYERS.index(name) > own}
    assert not above, f"{label(path)} imports {above}, which stand above it"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.stem)
def test_a_test_imports_neither_another_test_nor_the_labs_tests(path: Path):
    tests = {file.stem for folder in (TESTS, LAB_TESTS) for file in folder.rglob("test_*.py")}
    helpers_of_labs = {file.stem for file in LAB_TESTS.glob("*.py")}
    found = {name.split(".")[0] for name in imported_at_run_time(path)}
    assert not found & (tests | helpers_of_labs), "put what tests share into tests/helpers/"


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_a_file_fits_in_one_sitting(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_a_function_fits_on_a_screen(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.body[-1].end_lineno - body[0].lineno + 1 if body else 0
            # A kernel is one piece: its text is what the compiler sees at a time.
            is_kernel = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            assert lines <= (80 if is_kernel else 50), f"{node.name} has {lines} lines"


@pytest.mark.parametrize(
    "modules",
    [
        "minipaged.memory, minipaged.scheduler",
        "minipaged.memory.baselines.contiguous, minipaged.memory.baselines.virtual",
        "minipaged.memory.baselines.pages",
        "minipaged.tracing.events",
        "minipaged.evaluation.stories",
        "minipaged",
    ],
)
def test_bookkeeping_leaves_torch_alone(modules: str):
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_help_answers_without_torch():
    program = (
        "import sys; from minipaged.cli.main import app; app(['--help'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert result.returncode == 0
    assert b"demo" in result.stdout


def test_every_public_thing_has_a_docstring():
    missing = []
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"
            if public and not ast.get_docstring(node):
                missing.append(f"{label(path)}: {node.name}")
    assert not missing


def test_the_names_that_the_package_promises_exist():
    import minipaged

    for name in minipaged.__all__:
        assert getattr(minipaged, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = minipaged.LMM
