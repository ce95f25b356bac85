"""One page that replays a trace: blocks, block tables and queues, step by step.

    events: list[Event] = []
    llm = LLM(parts=Parts().traced(EventLog(events.append)))
    llm.generate(...)
    Replay(events, title="Four samples of one prompt").save("samples.html")

The page is one file that contains its style sheet, its program and the trace, and loads no other
files. The program is in assets/replay: state.js turns events into the state of the pools (read it
together with events.py); blocks.js, view.js, lanes.js and replay.js draw that state.
"""

import html
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from minipaged.errors import InvalidOption
from minipaged.tracing.event_check import find_fault
from minipaged.tracing.events import SCHEMA_VERSION, Event
from minipaged.utils.files import write_atomically

FRAME_HEIGHT = 720  # pixels, in a notebook or on another page


class Replay:
    """The events of a run, and the title of their page."""

    def __init__(self, events: Iterable[Event], title: str = "A trace of minipaged") -> None:
        self.events = list(events)
        self.title = title

    @classmethod
    def read(cls, path: str | Path, title: str | None = None) -> "Replay":
        """Read a file of JSON lines, as `--trace` writes it; the title defaults to its name.

        Raises InvalidOption if the file is missing, empty, damaged or of another version.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InvalidOption(f"{path} cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise InvalidOption(
                f"{path} is not a text file, so it is not a trace: give a file that --trace wrote."
            ) from error
        events = [_parse(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
        if not events:
            raise InvalidOption(f"{path} is empty: give a file that --trace wrote.")
        return cls(events, path.name if title is None else title)

    def html(self) -> str:
        """Return the complete page."""
        return fill_page("replay.html", title=html.escape(self.title), trace=self._trace())

    def save(self, path: str | Path) -> None:
        """Write the page atomically. Raises InvalidOption if the path cannot be written."""
        write_atomically(Path(path), self.html())

    def _repr_html_(self) -> str:
        """Return the page in a frame, for notebooks."""
        title, page = html.escape(self.title), html.escape(self.html())
        return (
            f'<iframe class="replay" title="{title}" srcdoc="{page}" loading="lazy" '
            f'style="width: 100%; height: {FRAME_HEIGHT}px; border: 0"></iframe>'
        )

    def _trace(self) -> str:
        """Return the events as JSON that cannot end the script element that contains it."""
        events = ",\n".join(event.to_json() for event in self.events)
        return f"[{events}]".replace("<", "\\u003c")


def fill_page(name: str, **texts: str) -> str:
    """Fill a page of assets/replay: {{title}} becomes a text, {{state.js}} the file's content."""
    folder = files("minipaged") / "assets" / "replay"

    def fill(place: re.Match[str]) -> str:
        known = texts.get(place[1])
        return (folder / place[1]).read_text("utf-8") if known is None else known

    # In one pass, so that a title or a request named "{{trace}}" is not replaced in turn.
    return re.sub(r"\{\{([\w.]+)\}\}", fill, (folder / name).read_text("utf-8"))


def _parse(path: Path, number: int, line: str) -> Event:
    """Parse one line of a trace. Raises InvalidOption with the line number."""
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidOption(
            f"{path} is damaged: line {number} is not JSON. Record the trace again."
        ) from error
    if not isinstance(fields, dict) or not fields.keys() & {"v", "event"}:
        raise InvalidOption(
            f"{path} is not a trace: line {number} is not an event of minipaged. "
            "Give a file that --trace wrote."
        )
    version = fields.pop("v", None)
    if version != SCHEMA_VERSION:
        found = "no version" if version is None else f"version {version!r}"
        raise InvalidOption(
            f"{path} has events of {found} (line {number}), but this minipaged reads only version "
            f"{SCHEMA_VERSION}: record the trace again with this minipaged."
        )
    fault = find_fault(fields)
    if fault is not None:
        raise InvalidOption(
            f"{path} is damaged: line {number} cannot be replayed, since {fault}. Record the trace "
            "again."
        )
    event, step, time = (fields.pop(name) for name in ("event", "step", "time"))
    return Event(event, step, time, fields)
