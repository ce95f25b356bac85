"""The Dockerfile and the systemd unit: their commands are run, and their limits agree."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from servers import running

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "serve_a_model.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "docs" / "examples" / "Dockerfile").read_text(encoding="utf-8")
UNIT = (ROOT / "docs" / "examples" / "minipaged.service").read_text(encoding="utf-8")


def instruction(name: str) -> str:
    """The last instruction of the Dockerfile by this name."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)[-1]


def setting(name: str) -> str:
    [value] = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return value


COMMANDS = {
    "docker": json.loads(instruction("ENTRYPOINT")),
    "systemd": shlex.split(setting("ExecStart")),
}


@pytest.mark.parametrize("where", COMMANDS)
def test_the_command_of_an_example_serves_until_sigterm(where, tmp_path):
    program, verb, *flags = COMMANDS[where]
    assert (Path(program).name, verb) == ("minipaged", "serve")
    at = flags.index("--port")
    assert flags[at + 1] == "8000"
    del flags[at : at + 2]  # the tests' servers take free ports
    flags[flags.index("--host") + 1] = "127.0.0.1"
    with running(tmp_path, *flags) as server:
        assert check_health(where, server.port) == 0
        assert server.stop() == 0
        assert check_health(where, server.port) != 0


def check_health(where: str, port: int) -> int:
    """The exit code of the example's health check, which does not wait here."""
    if where == "docker":
        command = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
        assert command[0] == "python"
        command[0] = sys.executable
    else:
        command = shlex.split(setting("ExecStartPost"))
        if shutil.which(command[0]) is None:
            pytest.skip("curl is not installed")
        command[command.index("--retry") + 1] = "0"
    command = [argument.replace(":8000/", f":{port}/") for argument in command]
    return subprocess.run(command, capture_output=True, timeout=30).returncode


@pytest.mark.parametrize("where", COMMANDS)
def test_a_server_is_killed_only_after_its_grace_period(where):
    command = COMMANDS[where]
    grace = int(command[command.index("--grace") + 1])
    patience = {
        "docker": re.findall(r"--stop-timeout (\d+)", GUIDE + DOCKERFILE),
        "systemd": [setting("TimeoutStopSec")],
    }[where]
    assert all(int(seconds) >= grace + 5 for seconds in patience)


def test_the_image_copies_all_that_the_build_reads():
    lines = re.findall(r"^COPY (?!--from)(.*) (\S+)$", DOCKERFILE, re.MULTILINE)
    copied = {path: target for line, target in lines for path in line.split()}
    assert {"pyproject.toml", "README.md", "LICENSE", "minipaged"} < copied.keys()
    for path, target in copied.items():
        assert (ROOT / path).exists()
        assert target == ("/source/" if (ROOT / path).is_file() else f"/source/{path}")
    step = (ROOT / "tutorials" / "in_the_wheel.py").read_text(encoding="utf-8")
    read = re.findall(r"\"((?:docs|tutorials)/[^\"]+)\"", step)
    assert len(read) > 5
    assert all(path.startswith(tuple(f"{each}/" for each in copied)) for path in read)


def test_the_image_runs_without_privileges():
    assert instruction("USER") == "minipaged"
    assert DOCKERFILE.index("\nUSER ") < DOCKERFILE.index("\nENTRYPOINT ")


def test_the_image_and_the_guide_name_extras_that_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\[(\w+)\]\"", DOCKERFILE):
        assert re.search(rf"^{extra} = \[$", project, re.MULTILINE)
    [torch] = re.findall(r"\"(torch[^\"]*)\"", DOCKERFILE)
    assert f'"{torch}"' in project, "the library's own range of versions"


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    unit = tmp_path / "minipaged.service"
    for program in ("/opt/minipaged/bin/minipaged", "/usr/bin/curl"):
        assert program in UNIT
    installed = UNIT.replace("/opt/minipaged/bin/minipaged", "/bin/true")
    unit.write_text(installed.replace("/usr/bin/curl", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
