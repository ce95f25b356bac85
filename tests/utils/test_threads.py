"""Threads of a CPU: how many, and how they wait."""

import os
import subprocess
import sys
from math import inf

import pytest

from minipaged.utils import threads


@pytest.fixture
def fresh(monkeypatch):
    """A process that has chosen nothing, and has not imported torch."""
    for name in (*threads.WAITING, "OMP_NUM_THREADS"):
        # set first, so that what a test leaves there is removed
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "CHOSEN", {})
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads, "cpu_quota", lambda: inf)
    return monkeypatch


def load_of_machine(monkeypatch, load: float) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0), raising=False)


def test_on_an_idle_machine_threads_spin_and_then_sleep(fresh):
    load_of_machine(fresh, 0.9)
    threads.choose_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["GOMP_SPINCOUNT"] == str(threads.TURNS)
    assert "OMP_NUM_THREADS" not in os.environ
    assert threads.describe_waiting() == f"OMP_WAIT_POLICY=PASSIVE, GOMP_SPINCOUNT={threads.TURNS}"


def test_on_a_busy_machine_threads_sleep_at_once(fresh):
    load_of_machine(fresh, 1.1)
    threads.choose_threads()
    assert threads.CHOSEN == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "GOMP_SPINCOUNT" not in os.environ


def test_a_machine_without_a_known_load_counts_as_busy(fresh):
    fresh.delattr(os, "getloadavg", raising=False)
    assert not threads.is_idle()


@pytest.mark.parametrize("name", threads.WAITING)
def test_a_way_of_waiting_that_is_set_stays(fresh, name):
    fresh.setenv(name, "7")
    load_of_machine(fresh, 0.0)
    threads.choose_threads()
    assert threads.CHOSEN == {}
    assert threads.describe_waiting() == f"{name}=7"


def test_nothing_is_set_once_torch_is_imported(fresh):
    fresh.setitem(sys.modules, "torch", None)
    threads.choose_threads()
    assert threads.CHOSEN == {}
    assert threads.describe_waiting() == "the default of OpenMP"


@pytest.mark.parametrize(("quota", "expected"), [(inf, None), (4, None), (2.5, "3"), (0.2, "1")])
def test_threads_are_no_more_than_the_cores_that_a_container_gets(fresh, quota, expected):
    fresh.setattr(threads, "cpu_quota", lambda: quota)
    threads.choose_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected


def test_a_number_of_threads_that_is_set_stays(fresh):
    fresh.setenv("OMP_NUM_THREADS", "8")
    fresh.setattr(threads, "cpu_quota", lambda: 1.0)
    threads.choose_threads()
    assert os.environ["OMP_NUM_THREADS"] == "8"


def group(root, path: str, limit: str) -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(limit + "\n")


def in_group(root, lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)


def test_the_smallest_limit_of_a_group_and_those_above_counts(tmp_path):
    in_group(tmp_path, "1:cpu:/other\n0::/a/b\n")
    group(tmp_path, "a/b", "max 100000")
    assert threads.cpu_quota(tmp_path) == inf
    group(tmp_path, "a", "150000 100000")
    assert threads.cpu_quota(tmp_path) == 1.5
    group(tmp_path, "", "400000 100000")
    assert threads.cpu_quota(tmp_path) == 1.5
    group(tmp_path, "", "100000 100000")
    assert threads.cpu_quota(tmp_path) == 1
    group(tmp_path, "a/b", "50000 100000")
    assert threads.cpu_quota(tmp_path) == 0.5


def test_a_container_sees_its_own_group_as_the_first(tmp_path):
    in_group(tmp_path, "0::/\n")
    group(tmp_path, "", "200000 100000")
    assert threads.cpu_quota(tmp_path) == 2


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert threads.cpu_quota(tmp_path) == inf
    in_group(tmp_path, "1:cpu:/other\n")
    assert threads.cpu_quota(tmp_path) == inf


def test_importing_the_library_chooses_before_torch_is_imported():
    environment = {k: v for k, v in os.environ.items() if k not in threads.WAITING}
    look = (
        "import sys, os, minipaged; assert 'torch' not in sys.modules; "
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "PASSIVE\n"
