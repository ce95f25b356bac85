"""Why a lab's test failed: yours, expected, and after which calls."""

import pytest

from minipaged.labs.grading import grade
from minipaged.labs.lab import Lab, Task

FILE = """
class BlockAllocator:
    def __init__(self, num_blocks):
        self.num_free = num_blocks

    def allocate(self):
        return 7

    def share(self, block):
        return [][block]

    def free(self, block):
        pass
"""

TESTS = """
import pytest
from minipaged.errors import CheckFailed


@pytest.fixture
def allocator(part):
    return part("allocator")(4)
"""

CASES = {
    "a_comparison": (
        "assert allocator.allocate() == 0",
        "allocator.allocate(): yours 7, expected 0; after BlockAllocator(4), allocate() = 7",
    ),
    "a_comparison_with_a_sentence": (
        "assert allocator.num_free == 3, 'one of four is taken'",
        "one of four is taken: allocator.num_free: yours 4, expected 3; after BlockAllocator(4)",
    ),
    "another_comparison": (
        "assert allocator.num_free in (1, 2)",
        "allocator.num_free: yours 4, expected one of (1, 2); after BlockAllocator(4)",
    ),
    "a_truth": (
        "assert allocator.free(0)",
        "allocator.free(0): yours false, expected true; after BlockAllocator(4), free(0)",
    ),
    "an_error_that_should_be_raised": (
        "with pytest.raises(ValueError): allocator.free(block=9)",
        "yours raised nothing, expected ValueError; after BlockAllocator(4), free(block=9)",
    ),
    "an_error_in_the_file": (
        "allocator.share(2)",
        (
            "IndexError: list index out of range (line 10 of your file); "
            "after BlockAllocator(4), share(2)"
        ),
    ),
    "a_rule_that_a_checker_finds_broken": (
        "raise CheckFailed('counting gives 1 (last call: free(1)).')",
        "CheckFailed: counting gives 1 (last call: free(1))",
    ),
    "the_last_of_many_calls": (
        "for n in range(9): allocator.free(n)\n    assert allocator.num_free == 5",
        (
            "allocator.num_free: yours 4, expected 5; after ..., free(3), free(4), free(5), "
            "free(6), free(7), free(8)"
        ),
    ),
    "no_calls_by_the_million": (
        "for n in range(6_000): allocator.free(n)\n    assert allocator.num_free == 5",
        "allocator.num_free: yours 4, expected 5",
    ),
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory) -> dict[str, str]:
    """By case, what the grader says of it: each case is a task with one test."""
    folder = tmp_path_factory.mktemp("lab")
    text, tasks = TESTS, []
    for number, (name, (body, _)) in enumerate(CASES.items(), start=1):
        text += f"\n\n@pytest.mark.lab(number=30, task={number})\n"
        text += f"def test_{name}(allocator):\n    {body}\n"
        tasks.append(Task(number, name, 1))
    (folder / "hidden").mkdir()
    (folder / "hidden" / "test_all.py").write_text(text, encoding="utf-8")
    (folder / "file.py").write_text(FILE, encoding="utf-8")
    parts = {"allocator": "BlockAllocator"}
    lab = Lab(30, "x", "x", ("minipaged.memory.allocator.BlockAllocator",), parts, tuple(tasks))
    graded = grade(lab, folder / "file.py", hidden_tests=folder / "hidden")
    return {result.task.title: result.complaint for result in graded}


@pytest.mark.parametrize("name", CASES)
def test_a_complaint_says_yours_expected_and_after_which_calls(complaints, name):
    assert complaints[name] == f"{name.replace('_', ' ')}: {CASES[name][1]}"
