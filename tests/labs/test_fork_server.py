"""The process that runs the labs' tests in copies of itself: on their own, and for so long only."""

import signal
import time
from pathlib import Path

import pytest

from minipaged.labs.fork_server import CAN_FORK, ForkServer
from minipaged.labs.runs import Job, Run

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="copies of a process are for Linux only")


@pytest.fixture(scope="module")
def server():
    server = ForkServer()
    yield server
    server.close()


def run(server: ForkServer, folder: Path, body: str, seconds: float = 60.0) -> Run:
    lines = ["import os, subprocess, sys", "from pathlib import Path", "def test_it():"]
    text = "\n".join([*lines, *(f"    {line}" for line in body.splitlines())])
    (folder / "test_it.py").write_text(text, encoding="utf-8")
    (folder / "pytest.ini").touch()
    arguments = ["-q", "-p", "minipaged.labs.plugin", "-p", "no:cacheprovider", "test_it.py"]
    return server.run(Job(arguments, str(folder), seconds))


def test_a_forked_process_has_torch_loaded_and_its_own_session_and_folder(server, tmp_path):
    body = """assert "torch" in sys.modules
assert os.getsid(0) == os.getpid() != os.getppid()
assert Path.cwd() == Path(__file__).parent
assert os.read(0, 1) == b""
"""
    assert "1 passed" in (printed := run(server, tmp_path, body).printed), printed


def test_forked_processes_are_independent(server, tmp_path):
    body = "assert not hasattr(os, 'seen')\nos.seen = os.environ['SEEN'] = 'seen'"
    for _ in range(2):
        assert "1 passed" in run(server, tmp_path, body).printed
    assert "1 passed" in run(server, tmp_path, "assert 'SEEN' not in os.environ").printed


def test_a_forked_process_that_hangs_is_killed_with_its_children(server, tmp_path):
    body = """child = subprocess.Popen(["sleep", "1000"])
Path("child").write_text(str(child.pid))
while True: pass
"""
    assert not run(server, tmp_path, body, seconds=3.0).ended
    assert is_gone(int((tmp_path / "child").read_text()))


def test_processes_started_by_finished_tests_are_killed(server, tmp_path):
    body = 'Path("child").write_text(str(subprocess.Popen(["sleep", "1000"]).pid))'
    assert "passed" in run(server, tmp_path, body).printed
    assert is_gone(int((tmp_path / "child").read_text()))


def test_tests_run_after_a_test_has_killed_the_server(server, tmp_path):
    run(server, tmp_path, f"os.kill(os.getppid(), {signal.SIGKILL})")
    assert "1 passed" in run(server, tmp_path, "pass").printed


def test_a_crash_is_reported(server, tmp_path):
    assert (
        "Fatal Python error" in run(server, tmp_path, "import ctypes\nctypes.string_at(0)").printed
    )


def is_gone(pid: int) -> bool:
    """Whether a process has ended: it may take the kernel a moment."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # no process waits for it any more
            return True
        time.sleep(0.01)
    return False
