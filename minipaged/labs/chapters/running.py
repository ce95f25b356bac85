"""Runs the code of a chapter, cell by cell, and keeps what each cell shows.

A chapter runs in a process of its own, since it may change anything in it:

    python -m minipaged.labs.chapters.running tutorials/03_blocks_and_block_tables.py outputs.json

The process prints one line per cell that has run. `run` starts it and counts these lines.
"""

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import types
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minipaged.labs.chapters.reading import ROOT, Cell, Chapter, read
from minipaged.utils.progress import progress_bar


@dataclass
class Output:
    """What a cell shows, in this order.

    Attributes:
        text: what it printed.
        value: the value of its last expression, as text.
        html: the same value as HTML, if its class has `_repr_html_`.
        pictures: the figures that it drew, as SVG.
        error: the exception that ended the chapter here, as one line.
    """

    text: str = ""
    value: str = ""
    html: str = ""
    pictures: list[str] = field(default_factory=list[str])
    error: str = ""


def run(chapter: Chapter) -> list[Output]:
    """The outputs of the cells of code, up to the one that ended the chapter. Shows a bar."""
    bar = progress_bar(
        desc=f"chapter {chapter.number}", total=sum(cell.is_code for cell in chapter.cells)
    )
    with tempfile.TemporaryDirectory() as folder, bar:
        file = Path(folder) / "outputs.json"
        command = [sys.executable, "-m", __name__, str(chapter.script.resolve()), str(file)]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONIOENCODING": "utf-8",
        }
        with (
            (Path(folder) / "errors").open("w+", errors="replace") as errors,
            subprocess.Popen(
                command, env=environment, cwd=folder, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            ) as process,
        ):  # fmt: skip
            try:
                for _ in process.stdout or ():
                    bar.update()
                process.wait()
            finally:
                process.kill()
            errors.seek(0)
            last = [line.strip() for line in errors if line.strip()][-1:]
        if not file.exists():
            return [Output(error=f"the process ended with code {process.returncode} {last}")]
        return [Output(**fields) for fields in json.loads(file.read_text(encoding="utf-8"))]


# ---- in the process of the chapter ---------------------------------------------------------------


def main(script: str, file: str) -> None:
    """Run a chapter; write its outputs to a file as JSON."""
    chapter, told = read(Path(script)), sys.stdout
    sys.path.insert(0, str(chapter.script.parent))  # of drawing.py
    module = types.ModuleType("__main__")
    module.__file__ = script
    sys.modules["__main__"] = module
    outputs: list[Output] = []
    for cell in (cell for cell in chapter.cells if cell.is_code):
        goes_on, output = run_cell(cell, script, vars(module))
        outputs.append(output)
        print("ran", file=told, flush=True)
        if not goes_on:
            break
    content = json.dumps([asdict(output) for output in outputs])
    Path(file).write_text(content, encoding="utf-8")


def run_cell(cell: Cell, script: str, names: dict[str, Any]) -> tuple[bool, Output]:
    """Return whether the chapter continues after this cell, and the output of the cell.

    The code keeps its line numbers in the script. So `inspect.getsource`, which Triton calls for a
    kernel, finds it there.
    """
    output, printed = Output(), io.StringIO()
    value: Any = None
    goes_on = True
    try:
        with contextlib.redirect_stdout(printed):
            tree = ast.parse("\n" * (cell.line - 1) + cell.source, script)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, script, "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), script, "eval"), names)
    except SystemExit as stop:  # drawing.stop, which has printed the reason, or sys.exit("reason")
        goes_on = False
        printed.write(stop.code if isinstance(stop.code, str) else "")
    except Exception as error:
        goes_on, output.error = False, f"{type(error).__name__}: {error}"
    output.text, output.pictures = printed.getvalue(), _pictures()
    if hasattr(value, "_repr_html_"):
        output.html = value._repr_html_()
    elif value is not None and not output.pictures:  # the value of a drawing cell is often an axis
        output.value = repr(value)
    return goes_on, output


def _pictures() -> list[str]:
    """All open figures of matplotlib as SVG. Closes them."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    from matplotlib import pyplot as plt

    drawn: list[str] = []
    for number in plt.get_fignums():
        file = io.StringIO()
        plt.figure(number).savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
        drawn.append(file.getvalue())
    plt.close("all")
    return drawn


if __name__ == "__main__":
    main(*sys.argv[1:])
