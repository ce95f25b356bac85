"""The architecture as assertions: imports go downwards, bookkeeping needs no tensors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from layers import LAB_TESTS, LAYERS, MODULES, PACKAGE

ROOT = PACKAGE.parent
PACKAGES = sorted(PACKAGE.rglob("__init__.py"))
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
            assert node.level == 0, f"{path}: write the whole name instead of a relative import"
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
    assert not above, f"{label(path)} imports {above}, which are above it"


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_only_serving_imports_http_libraries(path: Path):
    web = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"}
    found = {name.split(".")[0] for name in imported_at_run_time(path)}
    assert layer_of(path) == "serving" or not found & web


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
            # A kernel must be in one file: the compiler sees one file at a time.
            is_kernel = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            assert lines <= (80 if is_kernel else 50), f"{node.name} has {lines} lines"


def test_the_listing_of_the_package_is_a_table_of_contents():
    """At most 18 subjects: fewer than a reader can skim, and none in two places."""
    subjects = {layer_of(path) for path in MODULES} - {"__main__"}
    assert len(subjects) <= 18, sorted(subjects)


@pytest.mark.parametrize("path", PACKAGES, ids=label)
def test_the_docstring_of_a_package_is_one_sentence(path: Path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    purpose, _, rest = docstring.partition("\n")
    assert purpose.endswith("."), f"one sentence, not {purpose!r}"
    assert ". " not in purpose, f"one sentence, not {purpose!r}"
    assert not rest or rest.startswith("\n"), "an empty line after the purpose"


@pytest.mark.parametrize("path", PACKAGES[1:], ids=label)
def test_a_package_contains_only_a_docstring_and_imports(path: Path):
    """A docstring, and at most names that are imported from its modules."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body[1:]:
        is_list = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_list or isinstance(node, ast.ImportFrom), ast.unparse(node)


def without_torch() -> list[str]:
    """All packages themselves; and every module of those that need no tensors."""
    bookkeeping = ("memory", "scheduler", "sampling/params", "evaluation/sim", "evaluation/stories")
    bookkeeping += ("tracing", "config", "errors", "sequence", "labs/lab", "labs/catalogue")
    chosen = [path for path in MODULES if label(path).startswith(bookkeeping)]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGES + chosen}
    return sorted(name.removesuffix(".__init__") for name in names)


def test_bookkeeping_does_not_import_torch():
    program = (
        "import sys; from importlib import import_module\n"
        "for name in sys.argv[1:]:\n"
        "    import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'"
    )
    command = [sys.executable, "-c", program, *without_torch()]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_top_level_of_the_repository_holds_only_what_belongs_there():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    subjects = "minipaged docs tutorials tests README.md CHANGELOG.md CONTRIBUTING.md LICENSE"
    tools = "pyproject.toml mkdocs.yml model_weights_fetch.py .gitignore .ci .devcontainer"
    top = {Path(line).parts[0] for line in tracked.stdout.splitlines()}
    assert top == {*subjects.split(), *tools.split()}


def test_help_does_not_import_torch():
    program = (
        "import sys; from minipaged.cli.main import app; app(['--help'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert result.returncode == 0
    assert b"demo" in result.stdout


def test_a_start_imports_no_compiler_and_no_computer_algebra():
    program = (
        "import sys, torch; from minipaged import LLM, SamplingParams; llm = LLM('storyteller');"
        "llm.generate('Theo', SamplingParams(max_tokens=2), use_tqdm=False);"
        "from minipaged.models.packed import *; works(InOneDNN); works(InFloat16);"  # large models
        "sys.exit(str({'sympy', 'torch._dynamo', 'torch._inductor', 'triton'} & {*sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert result.stderr.strip() == "set()"


def test_tests_of_a_gpu_are_collected_without_the_packages_that_check_shapes():
    program = """
import sys
import pytest

class Without:
    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self):
        sys.modules |= dict.fromkeys(("beartype", "jaxtyping"))

without = "-p no:jaxtyping -p no:cacheprovider -p no:xdist".split()
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "tests", *without], [Without()]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:]
    assert "tests/worker/test_gpu.py" in result.stdout


def test_signatures_check_shapes_under_pytest():
    pytest.importorskip("jaxtyping")
    pytest.importorskip("beartype")
    torch = pytest.importorskip("torch")
    from jaxtyping import TypeCheckError

    from minipaged.sampling.sampler import Scores

    with pytest.raises(TypeCheckError):
        Scores(torch.zeros(3), [0], [None])  # logits without rows


def test_every_public_thing_has_a_docstring():
    missing = []
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"
            if public and not ast.get_docstring(node):
                missing.append(f"{label(path)}: {node.name}")
    assert not missing


def test_every_name_in_all_exists():
    import minipaged

    for name in minipaged.__all__:
        assert getattr(minipaged, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = minipaged.LMM
