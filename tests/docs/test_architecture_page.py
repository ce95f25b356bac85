"""docs/architecture.md agrees with the code: layout, layers, roles, journey of a request."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from layers import LAB_TESTS, LAYERS, PACKAGE

ROOT = PACKAGE.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def text_block(title: str) -> list[str]:
    [block] = re.findall(rf'^```text title="{re.escape(title)}"\n(.*?)^```', PAGE, re.M | re.S)
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def section(title: str) -> str:
    [body] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return body


def packages() -> list[Path]:
    return sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE, LAB_TESTS})


def test_the_layout_names_every_module_and_no_other():
    listed = [line.split()[0] for line in text_block("minipaged/")]
    modules = {path.name for path in PACKAGE.glob("*.py")}
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    folders -= {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_file()}
    assert sorted(listed) == sorted(modules | folders)


@pytest.mark.parametrize("package", packages(), ids=lambda path: path.name)
def test_the_layout_of_a_package_names_every_module_and_no_other(package: Path):
    lines = text_block(f"{package.relative_to(ROOT).as_posix()}/")
    listed = [line.split()[0] for line in lines]
    assert sorted(listed) == sorted(p.name for p in package.glob("*.py") if p.stem != "__init__")


def test_every_line_of_the_layout_has_a_description():
    for title in re.findall(r'^```text title="(minipaged/[^"]*)"', PAGE, re.M):
        for line in text_block(title):
            assert len(line.split(maxsplit=1)) == 2, line


def test_the_layers_on_the_page_are_those_that_the_import_test_enforces():
    assert " ".join(text_block("layers, from low to high")).split() == LAYERS


def test_every_role_is_in_the_table_of_roles():
    from minipaged.engine.parts import Parts

    rows = re.findall(r"^\| `(\w+)` \|", section("Roles"), re.M)
    assert rows == [field.name for field in fields(Parts)]


def test_the_journey_passes_every_stage_of_a_step():
    journey = section("A token's journey")
    stages = "schedule build run _commit sample"
    for stage in stages.split():
        assert re.search(rf"\{{\{{ name minipaged\.[\w.]+\.{stage} \}}\}}", journey), stage


def test_every_word_in_the_picture_of_the_layers_is_a_layer():
    body = section("Layers")
    for label in re.findall(r'\["(?:[^"<]*<br/>)?([^"]+)"\]', body):
        assert set(label.split(", ")) <= set(LAYERS), label
