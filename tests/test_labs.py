"""Every lab: the library scores all, a raw starter nothing, a mistake less in its own task."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minipaged.labs.catalogue import LABS
from minipaged.labs.grading import grade, run_in_new_process
from minipaged.labs.lab import Lab
from minipaged.labs.starter import library_text, starter
from minipaged.labs.watch import run_in_copy

if sys.platform == "win32":
    pytest.skip("grading in a copy of a process needs a fork", allow_module_level=True)

PATIENCE = 8.0  # seconds for a task of a variant that may never end

each_lab = pytest.mark.parametrize("lab", LABS, ids=lambda lab: f"lab{lab.number}")


def variants(kind: str) -> list:
    found = []
    for lab in LABS:
        module = importlib.import_module(f"lab_variants.lab{lab.number}")
        for name, variant in getattr(module, kind).items():
            found.append(pytest.param(lab, module.BEGINNING, variant, id=f"lab{lab.number}-{name}"))
    return found


def results(lab: Lab, text: str, folder: Path, only: int | None = None, run=run_in_copy) -> list:
    file = folder / lab.file_name
    file.write_text(text, encoding="utf-8")
    return list(grade(lab, file, only=only, run=run))


@each_lab
def test_the_librarys_own_scores_everything(lab: Lab, tmp_path: Path):
    for result in results(lab, library_text(lab), tmp_path):
        assert result.is_full, f"task {result.task.number}: {result.complaint}"
        assert result.points == result.task.points


@each_lab
def test_a_raw_starter_scores_nothing_and_each_task_says_why(lab: Lab, tmp_path: Path):
    for result in results(lab, starter(lab), tmp_path):
        assert result.num_tests > 0
        assert result.num_passed == 0, f"a test of task {result.task.number} tests nothing"
        assert "your turn" in result.complaint


@each_lab
def test_a_lab_has_mistakes_enough_and_something_unusual(lab: Lab):
    module = importlib.import_module(f"lab_variants.lab{lab.number}")
    assert len(module.WRONG) >= 5
    assert len(module.RIGHT) >= 1


@pytest.mark.parametrize(("lab", "beginning", "variant"), variants("WRONG"))
def test_a_classic_mistake_costs_points_in_its_own_task(lab, beginning, variant, tmp_path):
    number, text = variant
    impatient = replace(
        lab, tasks=tuple(replace(t, seconds=min(t.seconds, PATIENCE)) for t in lab.tasks)
    )
    text = library_text(lab) + beginning + text
    for task in impatient.tasks[: number - 1]:
        [before] = results(impatient, text, tmp_path, only=task.number)
        assert before.is_full, f"task {task.number} is not where the mistake is: {before.complaint}"
    [result] = results(impatient, text, tmp_path, only=number)
    assert result.points < result.task.points
    assert result.complaint


@pytest.mark.parametrize(("lab", "beginning", "variant"), variants("RIGHT"))
def test_an_unusual_solution_scores_everything(lab, beginning, variant, tmp_path):
    for result in results(lab, library_text(lab) + beginning + variant, tmp_path):
        assert result.is_full, f"task {result.task.number}: {result.complaint}"


def test_a_process_of_its_own_gives_the_same(tmp_path):
    lab = LABS[0]
    [result] = results(lab, starter(lab), tmp_path, only=2, run=run_in_new_process)
    assert (result.num_passed, result.points) == (0, 0)
    assert "your turn: BlockAllocator" in result.complaint
