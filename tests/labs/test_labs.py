"""Every lab: the library scores all points, a raw starter none, a mistake fewer in its own task."""

import importlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from minipaged.labs.catalogue import LABS
from minipaged.labs.gradescope import results as for_gradescope
from minipaged.labs.gradescope import write_autograder
from minipaged.labs.grading import grade
from minipaged.labs.lab import Lab, Task
from minipaged.labs.progress import Progress
from minipaged.labs.runs import run_in_new_process
from minipaged.labs.starter import library_text, starter
from minipaged.labs.verdict import Result, all_full

PATIENCE = 2.0  # seconds for a task that never ends

each_lab = pytest.mark.parametrize("lab", LABS, ids=lambda lab: f"lab{lab.number}")


def variants(kind: str) -> list:
    """All of a kind; by default, of the mistakes the first one of each task."""
    found, tasks = [], set()
    for lab in LABS:
        module = importlib.import_module(f"lab_variants.lab{lab.number}")
        for name, variant in getattr(module, kind).items():
            impatient = _impatient(lab) if "never_ends" in name else lab
            task = (lab.number, variant[0] if kind == "WRONG" else name)
            marks = [pytest.mark.full] if task in tasks else []
            tasks.add(task)
            found.append(
                pytest.param(
                    impatient, module.BEGINNING, variant, id=f"lab{lab.number}-{name}", marks=marks
                )
            )
    return found


def _impatient(lab: Lab) -> Lab:
    """The same lab, whose tasks are stopped after so few seconds that some might not be done."""
    return replace(lab, tasks=tuple(replace(task, seconds=PATIENCE) for task in lab.tasks))


def results(lab: Lab, text: str, folder: Path, only: int | None = None, run=None) -> list:
    file = folder / lab.file_name
    file.write_text(text, encoding="utf-8")
    return list(grade(lab, file, only=only, run=run))


def counting(graded: list[Result]) -> list[Result]:
    """Those that can be tested here: a lab may need a GPU, or what Linux alone has."""
    return [result for result in graded if result.counts]


@each_lab
def test_the_code_of_the_library_has_all_points(lab: Lab, tmp_path: Path):
    for result in counting(results(lab, library_text(lab), tmp_path)):
        assert result.is_full, f"task {result.task.number}: {result.complaint}"
        assert result.points == result.task.points


@each_lab
def test_a_raw_starter_has_no_points_and_each_task_says_why(lab: Lab, tmp_path: Path):
    for result in counting(results(lab, starter(lab), tmp_path)):
        assert result.num_tests > 0
        assert result.num_passed == 0, f"a test of task {result.task.number} tests nothing"
        assert "your turn" in result.complaint


@each_lab
def test_a_lab_has_enough_mutants_and_an_unusual_solution(lab: Lab):
    module = importlib.import_module(f"lab_variants.lab{lab.number}")
    assert len(module.WRONG) >= 5
    assert len(module.RIGHT) >= 1


@pytest.mark.parametrize(("lab", "beginning", "variant"), variants("WRONG"))
def test_a_classic_mistake_costs_points_in_its_own_task(lab, beginning, variant, tmp_path):
    number, text = variant
    text = library_text(lab) + beginning + text
    for task in lab.tasks[: number - 1]:
        [before] = results(lab, text, tmp_path, only=task.number)
        assert before.is_full or not before.counts, (
            f"task {task.number} is not where the mistake is: {before.complaint}"
        )
    [result] = results(lab, text, tmp_path, only=number)
    if not result.counts:
        pytest.skip(result.complaint)
    assert result.points < result.task.points
    assert result.complaint


@pytest.mark.parametrize(("lab", "beginning", "variant"), variants("RIGHT"))
def test_an_unusual_solution_scores_everything(lab, beginning, variant, tmp_path):
    for result in counting(results(lab, library_text(lab) + beginning + variant, tmp_path)):
        assert result.is_full, f"task {result.task.number}: {result.complaint}"


def test_grading_in_a_separate_process_gives_the_same_points(tmp_path):
    lab = LABS[0]
    [result] = results(lab, starter(lab), tmp_path, only=2, run=run_in_new_process)
    assert (result.num_passed, result.points) == (0, 0)
    assert "your turn: BlockAllocator" in result.complaint


def test_the_setup_for_gradescope_names_its_wheel(tmp_path):
    """A pattern is not a name: followed by the extra, it would match no file in the shell."""
    write_autograder(tmp_path, LABS[0])
    (tmp_path / "minipaged-1.0-py3-none-any.whl").touch()
    lines = (tmp_path / "setup.sh").read_text().splitlines()[-2:]
    script = "\n".join(lines).replace("/autograder/source", str(tmp_path))
    script = script.replace("/autograder/venv/bin/pip", "echo")
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout == f"install {tmp_path}/minipaged-1.0-py3-none-any.whl[labs]\n"


def test_gradescope_has_the_graders_results_even_if_the_grader_is_killed(tmp_path):
    write_autograder(tmp_path, LABS[0])
    results = tmp_path / "results.json"
    results.write_text('{"score": 100}')  # as student code does that then kills the grader
    script = (tmp_path / "run_autograder").read_text()
    script = script.replace("/autograder/results/results.json", str(results))
    script = script.replace("/autograder/venv/bin/minipaged", "bash -c 'kill -9 $$'")
    subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    known = json.loads(results.read_text())
    assert known["score"] == 0
    assert "The grader failed (status 137)" in known["output"]


# ---- tasks that cannot be tested everywhere ------------------------------------------------------

LAB = Lab(0, "of_two", "one task for all machines", (), {}, (Task(1, "", 90), Task(2, "", 10)))
DONE, SKIPPED = Result(LAB.tasks[0], 3, 3), Result(LAB.tasks[1], 0, 0, "no GPU", num_skipped=2)


def test_a_task_whose_tests_are_all_skipped_does_not_count():
    assert (SKIPPED.points, SKIPPED.most, SKIPPED.is_full) == (0, 0, False)
    assert all_full([DONE, SKIPPED])
    assert not all_full([replace(DONE, num_passed=2), SKIPPED])
    assert not all_full([SKIPPED]), "nothing was tested"


def test_without_a_report_or_with_some_tests_skipped_a_task_counts():
    assert Result(LAB.tasks[1], 0, 0, "not done after 60 seconds").most == 10
    assert replace(SKIPPED, num_tests=1).most == 10


def test_a_lab_is_complete_without_tasks_that_cannot_be_tested(tmp_path: Path):
    progress = Progress(tmp_path)
    progress.keep(LAB, SKIPPED)
    assert progress.points_of(LAB) is None
    progress.keep(LAB, DONE)
    progress.save()
    known = Progress.read(tmp_path)
    assert (known.points_of(LAB), known.most(LAB), known.is_full(LAB)) == (90, 90, True)


def test_points_from_another_machine_are_kept(tmp_path: Path):
    progress = Progress(tmp_path)
    for result in (DONE, replace(SKIPPED, num_passed=2, num_tests=2), SKIPPED):
        progress.keep(LAB, result)
    assert (progress.points_of(LAB), progress.most(LAB)) == (100, 100)


def test_gradescope_shows_that_a_task_does_not_count():
    [_, test] = for_gradescope(LAB, [DONE, SKIPPED])["tests"]
    assert (test["score"], test["max_score"]) == (0, 0)
    assert test["output"] == "not counted: no GPU"


def test_a_crash_of_the_tests_is_reported(tmp_path: Path):
    crash = library_text(LABS[0]) + "\nimport ctypes\nctypes.string_at(0)\n"
    [result] = results(LABS[0], crash, tmp_path, only=1, run=run_in_new_process)
    assert "at first all blocks are free: Fatal Python error" in result.complaint
    assert (result.points, result.most) == (0, 30)
