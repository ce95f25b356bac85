"""Which tests run by default: of a sampled matrix, enough for every value; of the others, all."""

from itertools import product
from math import prod

import pytest
from full_set import sample

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("lengths", [(1,), (5,), (3, 2), (2, 3, 4), (4, 4), (1, 6, 2)])
def test_a_sample_of_a_product_contains_every_value(lengths):
    cases = [
        frozenset(enumerate(values)) for values in product(*(range(length) for length in lengths))
    ]
    chosen = sample(cases)
    assert len(cases) == prod(lengths)
    assert set().union(*(cases[number] for number in chosen)) == set().union(*cases)
    assert len(chosen) == max(lengths)


MATRIX = """
import pytest

@pytest.mark.sampled
@pytest.mark.parametrize("b", "xyz")
@pytest.mark.parametrize("a", [1, 2])
def test_matrix(a, b):
    pass

@pytest.mark.full
def test_slow():
    pass

def test_quick():
    pass
"""


@pytest.fixture
def project(pytester, request, monkeypatch):
    monkeypatch.delenv("MINIPAGED_TESTS", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    conftest = request.config.rootpath / "tests" / "conftest.py"
    helpers = conftest.parent / "helpers"
    pytester.makeini(
        f"[pytest]\ntestpaths = .\npythonpath = {helpers}\nmarkers =\n    full\n    sampled\n"
    )
    pytester.makeconftest(conftest.read_text(encoding="utf-8"))
    pytester.makepyfile(MATRIX)
    return pytester


WAYS = [(), ("-p", "no:xdist")]
MORE_WAYS = [("-n", "0"), ("-n", "2")]


@pytest.mark.parametrize(
    "workers", WAYS + [pytest.param(way, marks=pytest.mark.full) for way in MORE_WAYS]
)
def test_left_out_tests_are_reported_in_one_line(project, workers):
    if workers != ("-p", "no:xdist"):
        pytest.importorskip("xdist")
    result = project.runpytest_subprocess(*workers)
    result.assert_outcomes(passed=4, deselected=0 if result_is_distributed(result) else 4)
    result.stdout.fnmatch_lines(["left out: 4 slow tests *; `pytest --full` runs all"])


def result_is_distributed(result) -> bool:
    return "workers" in result.stdout.str()


@pytest.mark.parametrize("way", ["option", "environment"])
def test_the_full_set_is_all(project, monkeypatch, way):
    if way == "environment":
        monkeypatch.setenv("MINIPAGED_TESTS", "full")
    result = project.runpytest_subprocess(*(["--full"] if way == "option" else []), "-n", "0")
    result.assert_outcomes(passed=8)
    assert "left out" not in result.stdout.str()
