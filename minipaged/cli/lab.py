"""`minipaged lab`: list, start, check, watch, hint, diff, reset, grade; others have own files."""

import contextlib
import difflib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from minipaged.cli import lab_challenge as challenge_command
from minipaged.cli.lab_brief import brief
from minipaged.cli.lab_ranks import ranks
from minipaged.cli.lab_route import route
from minipaged.errors import InvalidOption
from minipaged.labs.catalogue import LABS, find_lab
from minipaged.labs.challenge import FILE_NAME, NUMBER, STARTER, TITLE
from minipaged.labs.gradescope import write_autograder, write_results
from minipaged.labs.grading import grade
from minipaged.labs.lab import Lab, Task, no_such_task
from minipaged.labs.progress import Progress, next_free
from minipaged.labs.starter import library_text, starter
from minipaged.labs.verdict import Result, all_full, settle
from minipaged.utils.counts import counted
from minipaged.utils.files import write_atomically

app = typer.Typer(help="Teaching labs: write a part of the engine.", rich_markup_mode=None)
console = Console(highlight=False, soft_wrap=True)

_POLL_SECONDS = 0.1  # between two checks of a watched file

Number = Annotated[int, typer.Argument(help="Number of the lab.")]
File = Annotated[
    Path | None, typer.Option(help="Your file. Default: the lab's file in this folder.")
]
OneTask = Annotated[int | None, typer.Option(help="Run only this task.")]


@app.callback(invoke_without_command=True)
def lab(context: typer.Context) -> None:
    """Teaching labs: write a part of the engine, and serve a model with it."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("list")
def list_labs() -> None:
    """List the labs and your progress."""
    progress = _progress()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("lab", "", "tasks", "points", "file"):
        table.add_column(column)
    rows: dict[int, tuple[str, ...]] = {}
    for each in LABS:
        points = progress.points_of(each)
        most = f"{progress.most(each):g}"
        so_far = f"{points:g} of {most}" if points is not None else most
        here = each.file_name if Path(each.file_name).exists() else ""
        rows[each.number] = each.title, str(len(each.tasks)), so_far, here
    here = FILE_NAME if Path(FILE_NAME).exists() else ""
    rows[NUMBER] = TITLE, "open", "a ranking", here
    for number, row in sorted(rows.items()):
        table.add_row(str(number), *row)
    console.print(table)


@app.command()
def start(number: Number) -> None:
    """Write a lab's starter file to this folder, unless it exists."""
    file, text = _beginning(number)
    if file.exists():
        raise InvalidOption(
            f"{file} exists already and was not changed. To start over, run "
            f"`minipaged lab reset {number}`, which keeps a copy."
        )
    write_atomically(file, text)
    if number == NUMBER:
        console.print(f"{file}: change what you like, then run minipaged lab challenge")
        return
    chosen = find_lab(number)
    console.print(f'{file}: implement each function marked "your turn".')
    for task in chosen.tasks:
        console.print(f"  task {task.number}  {task.points:>4g} points  {task.title}")
    console.print(f"Read the brief: minipaged lab brief {number}")
    console.print(f"Then run: minipaged lab check {number}")


@app.command()
def check(number: Number, file: File = None, task: OneTask = None) -> None:
    """Run a lab's tests on your file. Exit code 1 unless all pass."""
    chosen = find_lab(number)
    raise typer.Exit(0 if all_full(_check(chosen, _file(chosen, file), task)) else 1)


@app.command()
def watch(number: Number, file: File = None, task: OneTask = None) -> None:
    """Run the tests after every save, until you press Ctrl-C."""
    chosen = find_lab(number)
    mine = _file(chosen, file)
    if not mine.is_file():
        raise InvalidOption(f"there is no {mine}: begin with `minipaged lab start {number}`.")
    console.print(f"Watching {mine}. Press Ctrl-C to stop.")
    last = 0.0
    while True:
        last = _wait_for_save(mine, last)
        console.rule(time.strftime("%H:%M:%S"))
        _check(chosen, mine, task)


@app.command()
def hint(
    number: Number,
    task: Annotated[
        int | None, typer.Option(help="Number of the task. Default: the first unfinished one.")
    ] = None,
) -> None:
    """Print the next hint for a task.

    After the last hint, it prints all of them again.
    """
    chosen, progress = find_lab(number), _progress()
    asked = _task(chosen, task) if task is not None else _first_open(chosen, progress)
    given = progress.next_hint(chosen, asked.number)
    progress.save()
    told = range(given, given + 1)
    if given >= len(asked.hints):
        console.print(f"Task {asked.number} has no more hints. All of them again:")
        told = range(len(asked.hints))
    for index in told:
        text = asked.hints[index]
        console.print(f"Task {asked.number}, hint {index + 1} of {len(asked.hints)}: {text}")


@app.command()
def diff(number: Number, file: File = None) -> None:
    """Compare your solution with the library's, once all tests pass."""
    chosen, progress = find_lab(number), _progress()
    mine = _file(chosen, file)
    if not progress.is_full(chosen):
        raise InvalidOption(
            f"the library's solution is shown once lab {number} has all its "
            f"{counted(progress.most(chosen), 'point')}: run `minipaged lab check {number}` to "
            "see what is missing."
        )
    lines = difflib.unified_diff(
        mine.read_text(encoding="utf-8").splitlines(),
        library_text(chosen).splitlines(),
        "yours",
        "the library's",
        lineterm="",
    )
    for line in lines:
        colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
        console.print(line, style=colour, markup=False)


@app.command()
def reset(number: Number) -> None:
    """Start a lab over. Your file is kept under another name."""
    file, text = _beginning(number)
    if file.exists():
        backup = next_free(file, ".")
        file.rename(backup)
        console.print(f"Your {file} was renamed to {backup}.")
    write_atomically(file, text)
    console.print(f"{file} is the lab's starter file again.")


@app.command("grade")
def grade_one(
    number: Number,
    file: Annotated[Path, typer.Argument(help="The student's file.")],
    gradescope: Annotated[
        Path | None, typer.Option(help="Write results.json for Gradescope to this file.")
    ] = None,
    hidden: Annotated[Path | None, typer.Option(help="Folder with additional tests.")] = None,
) -> None:
    """Grade a submission. Exit code 1 unless it gets all points."""
    chosen = find_lab(number)
    try:
        results = _print(grade(chosen, file, hidden_tests=hidden))
    except InvalidOption as error:  # the file is missing: no points, and the reason
        if gradescope is None:
            raise
        results = _print(Result(task, 0, 0, str(error)) for task in chosen.tasks)
    if gradescope is not None:  # last, after all of the student's code has run
        write_results(gradescope, chosen, results)
    raise typer.Exit(0 if all_full(results) else 1)


@app.command()
def autograder(
    number: Number,
    folder: Annotated[Path, typer.Argument(help="Folder to write the two scripts to.")],
) -> None:
    """Write setup.sh and run_autograder for Gradescope."""
    write_autograder(folder, find_lab(number))
    console.print(f"{folder}: zip both scripts together with a wheel of this library.")


app.command()(brief)
app.command()(challenge_command.challenge)
app.command()(route)
app.command()(ranks)


# ---- shared helpers ------------------------------------------------------------------------------


def _beginning(number: int) -> tuple[Path, str]:
    """The name and the text of a lab's starter file."""
    if number == NUMBER:
        return Path(FILE_NAME), STARTER
    chosen = find_lab(number)
    return Path(chosen.file_name), starter(chosen)


def _progress() -> Progress:
    progress = Progress.read(Path())
    if progress.note:
        console.print(progress.note, markup=False)
    return progress


def _file(chosen: Lab, file: Path | None) -> Path:
    return Path(chosen.file_name) if file is None else file


def _wait_for_save(file: Path, last: float) -> float:
    """Wait until the file is saved again, and return its new modification time."""
    changed = last
    while changed == last:
        time.sleep(_POLL_SECONDS)
        with contextlib.suppress(FileNotFoundError):  # some editors write a new file and rename it
            changed = file.stat().st_mtime
    return changed


def _task(chosen: Lab, number: int) -> Task:
    for task in chosen.tasks:
        if task.number == number:
            return task
    raise InvalidOption(no_such_task(chosen, number))


def _first_open(chosen: Lab, progress: Progress) -> Task:
    """The first task without full points, or the last task if all have them."""
    for task in chosen.tasks:
        if progress.points.get(f"{chosen.number}.{task.number}") != task.points:
            return task
    return chosen.tasks[-1]


def _check(chosen: Lab, file: Path, task: int | None) -> list[Result]:
    """Grade a file, print the results and save the progress."""
    progress = _progress()
    results = _print(grade(chosen, file, only=task, traces=Path()))
    for result in results:
        progress.keep(chosen, result)
    progress.save()
    if progress.is_full(chosen):
        console.print(f"All tests pass. Compare with ours: minipaged lab diff {chosen.number}")
    return results


def _print(results: Iterable[Result]) -> list[Result]:
    """Print one line per task as results arrive, then the points. Returns the final results."""
    done: list[Result] = []
    for result in results:
        done.append(result)
        sign, colour = ("ok", "green") if result.is_full else ("--", "red")
        passed = (
            f"{result.num_passed} of {counted(result.num_tests, 'test')}"
            if result.num_tests
            else ""
        )
        task, points = result.task, f"{result.points:g} of {counted(result.most, 'point')}"
        if not result.counts:
            sign, colour, passed, points = "..", "yellow", "skipped", "not counted"
        console.print(
            f"[{colour}]{sign}[/] task {task.number}  {task.title:32} {passed:>15}   {points}"
        )
        for line in result.told.splitlines():
            console.print(f"     {line}", markup=False)
        if result.trace:
            console.print(f"     replay it: minipaged trace view {result.trace}", markup=False)
    settled = settle(done)
    total, most = sum(r.points for r in settled), sum(r.most for r in settled)
    console.print(f"{total:g} of {counted(most, 'point')}")
    for note in [note for result in done for note in result.notes]:
        console.print(f"note: {note}", markup=False)
    return settled
