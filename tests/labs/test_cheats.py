"""Ways to fool the grader, each tried in a solution that solves no task: none earns a point."""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minipaged.cli.main import app
from minipaged.labs import catalogue
from minipaged.labs.fork_server import CAN_FORK
from minipaged.labs.gradescope import results as for_gradescope
from minipaged.labs.grading import grade
from minipaged.labs.lab import Lab, Task
from minipaged.labs.runs import run_in_new_process
from minipaged.labs.starter import library_text, starter
from minipaged.labs.verdict import settle

LAB = Lab(
    number=20,
    name="allocator",
    title="a small lab",
    sources=("minipaged.memory.allocator.BlockAllocator",),
    parts={"allocator": "BlockAllocator"},
    tasks=(
        Task(1, "count", 10, holes=("BlockAllocator.__init__", "BlockAllocator.num_free")),
        Task(2, "allocate", 10, holes=("BlockAllocator.allocate",)),
    ),
)

TESTS = """
import pytest
import torch


@pytest.mark.lab(number=20, task=1)
def test_all_blocks_are_free(part):
    assert part("allocator")(4).num_free == 4


@pytest.mark.lab(number=20, task=1)
def test_a_tensor_of_them_is_the_same(part):
    assert torch.equal(torch.tensor(part("allocator")(3).num_free), torch.tensor(3))


@pytest.mark.lab(number=20, task=2)
def test_a_block_is_handed_out(part):
    assert part("allocator")(1).allocate() == 0
"""

SKIPS = {
    "skip": "import pytest; pytest.skip('x')",
    "skip_of_unittest": "import unittest; raise unittest.SkipTest('x')",
    "import_or_skip": "import pytest; pytest.importorskip('no_such_module')",
    "xfail": "import pytest; pytest.xfail('x')",
}

EARLY_ENDS = {
    "exit_of_pytest": "import pytest; pytest.exit('x', returncode=0)",
    "os_exit": "import os; os._exit(0)",
    "keyboard_interrupt": "raise KeyboardInterrupt",
    "a_thread_that_ends_the_process": "import os, threading, time; "
    "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)",
    "the_supervisor_is_killed": "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); "
    "time.sleep(9)",
    "the_report_is_closed": "import os; os.closerange(3, 99)",
}

AT_LOAD = {
    "a_patched_runtest": """
import _pytest.python
_pytest.python.Function.runtest = lambda self: None
""",
    "patched_code_of_a_hook": """
import _pytest.runner
def nothing(item): pass
_pytest.runner.pytest_runtest_call.__code__ = nothing.__code__
""",
    "a_plugin_that_calls_all_passed": """
import gc, pytest
class Plugin:
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        report.outcome = "passed"
        return report
for each in gc.get_objects():
    if isinstance(each, pytest.Config):
        each.pluginmanager.register(Plugin())
""",
    "test_functions_without_a_body": """
import gc, pytest
for each in gc.get_objects():
    if isinstance(each, pytest.Function):
        each.obj = lambda *args, **options: None
""",
    "a_patched_library": """
from minipaged.memory.allocator import BlockAllocator as Theirs
Theirs.num_free = property(lambda self: 4)
""",
    "patched_torch": """
import torch
torch.equal = lambda *tensors: True
class BlockAllocator:
    def __init__(self, num_blocks): self.num_free = 4
    def allocate(self): return 0
""",
    "a_patched_builtin": """
import builtins
builtins.AssertionError = type("Passed", (Exception,), {})
""",
    "another_module_in_its_place": """
import sys, types
sys.modules["minipaged.memory.allocator"] = types.ModuleType("minipaged.memory.allocator")
""",
    "equal_to_everything": """
class Number(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
class BlockAllocator:
    def __init__(self, num_blocks): self.num_free = Number(0)
    def allocate(self): return Number(0)
""",
    "skips_when_it_is_loaded": "import pytest; pytest.skip('x', allow_module_level=True)",
    "exits_when_it_is_loaded": "import sys; sys.exit(0)",
    "a_report_without_the_nonce": """
import json, os
for number in range(1, 40):
    try:
        os.write(number, b'0' * 32 + b' {"end": true}\\n')
    except OSError:
        pass
""",
    "a_junit_report": """
import os, sys
for argument in sys.argv: pass
open("task1.xml", "w").write('<!DOCTYPE a [<!ENTITY a "aaaa">]><testsuite><testcase/>')
os._exit(0)
""",
    "tests_deleted_and_a_conftest_put_there": """
import os, shutil
shutil.rmtree("tests")
os.makedirs("tests/hidden")
open("tests/conftest.py", "w").write("collect_ignore_glob = ['*']")
open("tests/hidden/test_it.py", "w").write("def test_it(): pass")
os.chdir("/")
""",
    "output_that_is_not_utf8_at_the_end": """
import atexit, os
atexit.register(lambda: os.write(1, b"\\xff\\xfe" * 999))
os.write(1, b"\\xff\\xfe<!--")
""",
    "standard_files_closed": "import os; [os.close(n) for n in (0, 1, 2)]",
}


def body(text: str) -> str:
    """A part whose methods run these lines."""
    lines = "\n    ".join(text.strip().splitlines())
    return f"""
def cheat():
    {lines}


class BlockAllocator:
    def __init__(self, num_blocks): cheat()
    @property
    def num_free(self): return -1
    def allocate(self): cheat()
"""


ALL = {name: body(text) for name, text in (SKIPS | EARLY_ENDS).items()} | AT_LOAD


@pytest.fixture
def graded(tmp_path):
    """`graded(text)`: the results of the small lab for a file with this text."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "test_small.py").write_text(TESTS, encoding="utf-8")

    def graded(text: str, lab: Lab = LAB, run=None, only: int | None = None) -> list:
        file = tmp_path / lab.file_name
        file.write_text(text, encoding="utf-8")
        return settle(grade(lab, file, hidden_tests=hidden, run=run, only=only))

    return graded


def told(results: list) -> str:
    return "\n".join(result.told for result in results)


def test_an_honest_solution_has_all_points(graded):
    assert [result.points for result in graded(library_text(LAB))] == [10, 10]


@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_no_way_around_the_tests_earns_points(graded, text):
    results = graded(starter(LAB) + "\n" + text, only=1)
    assert [result.points for result in results] == [0], told(results)
    assert all(result.told and result.counts for result in results)
    assert "SyntaxError" not in told(results), "it is not tried at all"
    assert not any(result.is_full for result in results)


@pytest.mark.full
@pytest.mark.parametrize("name", ["skip", "os_exit", "a_patched_runtest", "patched_torch"])
def test_no_cheat_earns_points_without_fork_either(graded, name):
    results = graded(starter(LAB) + "\n" + ALL[name], run=run_in_new_process, only=1)
    assert [result.points for result in results] == [0], told(results)


def test_a_test_that_is_skipped_by_the_solution_has_failed_and_says_so(graded):
    [result, _] = graded(starter(LAB) + body(SKIPS["skip"]))
    assert (result.num_passed, result.num_tests) == (0, 2)
    assert "Skipped: x" in result.complaint


def test_a_test_that_must_fail_and_passes_voids_the_whole_grade(graded):
    text = library_text(LAB) + AT_LOAD["test_functions_without_a_body"]
    results = graded(text)
    assert all("a test that must fail has passed" in result.told for result in results)
    assert {entry["score"] for entry in for_gradescope(LAB, results)["tests"]} == {0}


def test_the_seal_names_what_was_replaced(graded):
    results = graded(library_text(LAB) + AT_LOAD["patched_torch"])
    assert "torch.equal" in told(results)


# ---- endless output, many processes --------------------------------------------------------------


def quick(seconds: float) -> Lab:
    tasks = tuple(Task(t.number, t.title, t.points, t.holes, (), seconds) for t in LAB.tasks[:1])
    return Lab(LAB.number, LAB.name, LAB.title, LAB.sources, LAB.parts, tasks)


def test_endless_output_is_cut_off(graded):
    text = body('print("x" * 2**26)')
    began = time.monotonic()
    [result] = graded(text, quick(20.0))
    assert result.points == 0
    assert "File too large" in result.told
    assert time.monotonic() - began < 20


@pytest.mark.skipif(not CAN_FORK, reason="only Linux gives orphans to another parent")
def test_a_process_that_leaves_its_session_does_not_outlive_the_run(graded, tmp_path):
    """It would write over results.json after grading."""
    written = tmp_path / "pid"
    orphan = f"""
import os, time
if not os.fork():
    os.setsid()
    if os.fork(): os._exit(0)
    open({str(written)!r}, "w").write(str(os.getpid()))
    time.sleep(100)
    os._exit(0)
while not os.path.exists({str(written)!r}) or not open({str(written)!r}).read(): time.sleep(0.01)
"""
    graded(starter(LAB) + body(orphan), only=1)
    pid = int(written.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(not CAN_FORK, reason="only Linux gives orphans to another parent")
def test_processes_without_end_are_stopped_at_the_time_limit(graded):
    many = "import os, time\nfor _ in range(100): os.fork() or time.sleep(60)\ntime.sleep(60)"
    began = time.monotonic()
    [result] = graded(starter(LAB) + body(many), quick(1.0))
    assert "not done after 1 second:" in result.told
    assert time.monotonic() - began < 10


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`minipaged lab ...` in an empty folder, with the small lab among the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minipaged.cli.lab.find_lab", lambda number: LAB)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "test_small.py").write_text(TESTS, encoding="utf-8")

    def call(text: str) -> tuple[int, str, dict]:
        (tmp_path / LAB.file_name).write_text(text, encoding="utf-8")
        words = ["lab", "grade", "20", LAB.file_name, "--hidden", "hidden"]
        result = CliRunner().invoke(app, [*words, "--gradescope", "results.json"])
        return result.exit_code, result.stdout, json.loads(Path("results.json").read_text())

    return call


def test_results_that_student_code_writes_are_replaced(command, tmp_path):
    forged = f"""
open({str(tmp_path / "results.json")!r}, "w").write('{{"score": 100}}')
import os
os._exit(0)
"""
    code, printed, results = command(starter(LAB) + forged)
    assert code == 1
    assert "0 of 20 points" in printed
    assert "score" not in results
    assert [entry["score"] for entry in results["tests"]] == [0, 0]


def test_a_void_grade_says_why_to_student_and_teacher(command):
    _, printed, results = command(library_text(LAB) + AT_LOAD["a_patched_runtest"])
    assert "the grade is void" in printed
    assert "0 of 20 points" in printed
    assert all("the grade is void" in entry["output"] for entry in results["tests"])


# ---- the student's own code ----------------------------------------------------------------------

SUBCLASS = """
from minipaged.memory import BlockAllocator as Theirs
class BlockAllocator(Theirs):
    pass
"""
TAKEN = {
    "imported": "\nfrom minipaged.memory.allocator import BlockAllocator\n",
    "subclassed": SUBCLASS,
    "wrapped": """
import minipaged.memory.allocator as theirs
class BlockAllocator:
    def __init__(self, n): self._inner = theirs.BlockAllocator(n)
    def __getattr__(self, name): return getattr(self._inner, name)
""",
    "looked_up": """
import importlib
BlockAllocator = getattr(importlib.import_module("minipaged.mem" + "ory"), "BlockAllocator")
""",
    "its_source_run": """
import inspect, minipaged.memory
exec(inspect.getsource(minipaged.memory.BlockAllocator))
""",
}


@pytest.mark.parametrize("text", TAKEN.values(), ids=TAKEN)
def test_submitting_the_class_of_the_library_is_reported(graded, text):
    results = graded(starter(LAB) + text)
    assert results[0].notes


def test_a_copy_of_the_source_of_the_library_is_reported(graded):
    [note] = graded(library_text(catalogue.LABS[0]))[0].notes
    assert "identical to the library's text" in note


def test_an_original_solution_is_not_reported(graded):
    own = """
class BlockAllocator:
    def __init__(self, num_blocks):
        self.num_blocks, self.unused = num_blocks, list(range(num_blocks))
    @property
    def num_free(self):
        return len(self.unused)
    def allocate(self):
        return self.unused.pop(0)
"""
    results = graded(starter(LAB) + own)
    assert [result.points for result in results] == [10, 10]
    assert results[0].notes == ()


@pytest.mark.parametrize("lab", catalogue.LABS, ids=lambda lab: f"lab{lab.number}")
def test_imports_of_the_starter_are_not_reported(lab):
    from minipaged.labs.own_work import read_notes

    assert read_notes(lab, starter(lab)) == []
