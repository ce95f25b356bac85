"""Files for Gradescope: results.json, and the two scripts of an autograder.

An autograder is a zip of `setup.sh`, run once when it is built, and `run_autograder`, run for each
submission. Submissions are in /autograder/submission, and results.json must be written to
/autograder/results.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from minipaged import __version__
from minipaged.labs.lab import Lab
from minipaged.labs.verdict import Result, settle
from minipaged.utils.counts import counted
from minipaged.utils.files import write_atomically

SETUP = """\
#!/usr/bin/env bash
# Run once: installs Python, PyTorch for CPUs, and the library with the dependencies of its labs.
set -euo pipefail
apt-get update && apt-get install -y python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install --index-url https://download.pytorch.org/whl/cpu torch
wheel=$(echo /autograder/source/minipaged-*.whl)  # a pattern with [labs] matches none
/autograder/venv/bin/pip install "${wheel}[labs]"
"""

RUN = """\
#!/usr/bin/env bash
# Run for each submission. Whatever the submission does, the grader writes results.json.
set -uo pipefail
results=/autograder/results/results.json
/autograder/venv/bin/minipaged lab grade {number} "/autograder/submission/{file}" \\
    --gradescope "$results"
status=$?
if [ "$status" -gt 1 ]; then  # the grader itself was ended, or could not write
    rm -rf "$results"
    told="The grader failed (status $status): no points."
    echo "{{\\"score\\": 0, \\"output\\": \\"$told\\"}}" > "$results"
fi
exit 0
"""


def results(lab: Lab, graded: Iterable[Result]) -> dict[str, object]:
    """The content of results.json, with one entry per task."""
    settled = settle(graded)
    tests = [
        {
            "number": f"{lab.number}.{result.task.number}",
            "name": result.task.title,
            "score": result.points,
            "max_score": result.most,
            "status": "passed" if result.is_full or not result.counts else "failed",
            "output": _told(result),
            "visibility": "visible",
        }
        for result in settled
    ]
    notes = [f"note: {note}" for result in settled for note in result.notes]
    output = "\n".join([f"{lab.title} (minipaged {__version__})", *notes])
    return {"output": output, "tests": tests}


def _told(result: Result) -> str:
    if not result.counts:
        return f"not counted: {result.complaint}"
    passed = f"{result.num_passed} of {counted(result.num_tests, 'test')} passed"
    return f"{passed}\n{result.told}".strip() if result.num_tests else result.told


def write_results(path: Path, lab: Lab, graded: Iterable[Result]) -> None:
    """Write results.json atomically. Raises InvalidOption if it cannot be written."""
    write_atomically(path, json.dumps(results(lab, graded), indent=2) + "\n")


def write_autograder(folder: Path, lab: Lab) -> None:
    """Write `setup.sh` and `run_autograder` to a folder, to zip with a wheel of this library."""
    folder.mkdir(parents=True, exist_ok=True)
    scripts = {
        "setup.sh": SETUP,
        "run_autograder": RUN.format(number=lab.number, file=lab.file_name),
    }
    for name, text in scripts.items():
        write_atomically(folder / name, text)
        (folder / name).chmod(0o755)
