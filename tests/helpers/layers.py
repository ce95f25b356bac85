"""The packages of the library, from low to high, and all of its modules."""

from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "minipaged"


# From low to high: a module may import only layers before its own, and its own package.
LAYERS = (
    "errors utils config sequence memory scheduler tracing attention models tokenizer sampling "
    "worker engine llm serving evaluation labs cli __main__"
).split()


LAB_TESTS = PACKAGE / "labs" / "tests"


MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py" and path.parent != LAB_TESTS
)
