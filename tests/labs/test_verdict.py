"""How a run's report is judged: reports are written here by hand, and no process runs."""

import json
from pathlib import Path

import pytest
from lab_variants import lab3

from minipaged.labs.catalogue import LABS
from minipaged.labs.grading import _Grader, _read_tests, _run, grade
from minipaged.labs.lab import Task
from minipaged.labs.runs import LONGEST_REPORT, Run
from minipaged.labs.starter import library_text
from minipaged.labs.verdict import Expected, Result, judge, settle

NONCE, TASK = "n" * 32, Task(1, "a task", 30)
EXPECTED = [
    Expected("t::test_a", 1),
    Expected("t::test_b", 1, essential="b is what it is about."),
    Expected("t::test_c", 1),
]
CANARIES = ["t::test_first", "t::test_last"]


def outcome(test: str, passed: bool, complaint: str = "yours 1, expected 2") -> dict:
    return {
        "test": test,
        "passed": passed,
        "complaint": "" if passed else complaint,
        "trace": "",
    }


def report(*failing: str, more: list | None = None, end: bool = True) -> list:
    canaries = [outcome(canary, passed=False) for canary in CANARIES]
    tests = [outcome(each.test, each.test not in failing) for each in EXPECTED]
    return [*canaries, *tests, *(more or []), *[{"end": 5}] * end]


def judged(records: list, *, printed: str = "", raw: bytes = b"", nonce: str = NONCE) -> Result:
    lines = "".join(f"{nonce} {json.dumps(record)}\n" for record in records)
    run = Run(lines.encode() + raw, printed, ended=True)
    return judge(TASK, EXPECTED, CANARIES, run, NONCE)


def test_points_are_given_in_the_part_that_passes():
    assert judged(report()).points == 30
    result = judged(report("t::test_a"))
    assert (result.points, result.complaint) == (20, "a: yours 1, expected 2")


def test_a_task_that_does_not_end_is_told_the_two_likely_causes():
    complaint = judge(TASK, EXPECTED, CANARIES, Run(b"", "", ended=False), NONCE).complaint
    assert complaint.startswith("not done after ")
    assert "an endless loop, or a call that takes longer the larger" in complaint


def test_without_an_essential_property_a_task_has_no_points_and_says_why():
    result = judged(report("t::test_a", "t::test_b"))
    assert (result.points, result.num_passed) == (0, 1)
    assert result.told == ("no points without this: b is what it is about.\nb: yours 1, expected 2")


def test_if_nothing_passes_the_first_failed_test_is_reported():
    result = judged(report(*(each.test for each in EXPECTED)))
    assert (result.essential, result.complaint) == ("", "a: yours 1, expected 2")


@pytest.mark.parametrize(
    "raw",
    [
        b"t::test_a passed\n",
        b"0" * 32 + b' {"end": 5}\n',
        b"\xff\xfe\x00\n",
        NONCE.encode() + b" {\n",
        NONCE.encode() + b" " + b"[" * 100_000 + b"\n",
        NONCE.encode() + b" []\n",
        b" " * LONGEST_REPORT,
    ],
    ids=["words", "another_nonce", "bytes", "not_json", "too_deep", "no_record", "too_long"],
)
def test_a_report_modified_by_student_code_is_void(raw):
    assert "something other than the grader" in judged(report(), raw=raw).void


def test_a_report_whose_lines_have_another_nonce_is_void():
    assert judged(report(), nonce="0" * 32).void


@pytest.mark.parametrize("canary", CANARIES)
def test_a_canary_that_passes_voids_the_grade(canary):
    records = [outcome(canary, passed=True) if r.get("test") == canary else r for r in report()]
    assert "a test that must fail has passed" in judged(records).void


def test_a_duplicate_or_unexpected_test_voids_the_grade():
    for test in ("t::test_a", "t::test_d"):
        assert "not those of the task" in judged(report(more=[outcome(test, passed=True)])).void


def test_a_run_that_ends_early_has_no_points_and_names_its_last_test():
    records = report(end=False)[:4]
    assert judged(records).points == 0
    assert judged(records).complaint.startswith("c: the run ended here")
    crash = judged(records, printed="....Fatal Python error: Segmentation fault\n\nCurrent")
    assert crash.complaint == "c: Fatal Python error: Segmentation fault"


def test_if_one_result_is_void_all_of_them_are():
    results = settle([judged(report()), Result(TASK, 0, 0, void="a reason.")])
    assert [(result.points, result.void) for result in results] == [(0, "a reason.")] * 2


# ---- the labs' own essential tests ---------------------------------------------------------------


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: f"lab{lab.number}")
def test_every_task_that_serves_no_model_has_an_essential_test(lab):
    tests = _Grader(lab, lab.file_name, b"", _read_tests(None), _run).list_tests()
    with_essential = {test.task for test in tests if test.essential}
    serving = {task.number for task in lab.tasks if "serve a language model" in task.title}
    assert with_essential == {task.number for task in lab.tasks} - serving


@pytest.mark.parametrize("name", ["gathers_after_all", "gathers_block_by_block"])
def test_gathering_earns_no_points_where_it_is_forbidden(name, tmp_path: Path):
    lab = LABS[2]
    file = tmp_path / lab.file_name
    file.write_text(library_text(lab) + lab3.WRONG[name][1], encoding="utf-8")
    [result] = grade(lab, file, only=3)
    assert result.num_passed >= result.num_tests - 2, "its numbers are right"
    assert result.points == 0
    assert "do not gather" in result.told
