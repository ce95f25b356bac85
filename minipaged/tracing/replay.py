"""A trace as one page that replays it: blocks, block tables and queues, step by step.

    events: list[Event] = []
    llm = LLM(parts=Parts().traced(EventLog(events.append)))
    llm.generate(...)
    Replay(events, title="Four samples of one prompt").save("samples.html")

The page is one file: its style sheet, its program and the trace stand in it, and it asks nobody for
anything. How events become a picture is in assets/replay/state.js, which is worth reading beside
events.py; how it is drawn, in blocks.js and replay.js there.
"""

import html
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from minipaged.errors import InvalidOption
from minipaged.tracing.events import SCHEMA_VERSION, Event
from minipaged.utils.files import write_atomically

FRAME_HEIGHT = 720  # pixels, in a notebook or on another page


class Replay:
    """The events of one or more steps, and a title to show above them."""

    def __init__(self, events: Iterable[Event], title: str = "A trace of minipaged") -> None:
        self.events = list(events)
        self.title = title

    @classmethod
    def read(cls, path: str | Path, title: str | None = None) -> "Replay":
        """From a file of JSON lines, as `--trace` writes it; the title is the file's name.

        Raises InvalidOption if it is missing, empty, damaged or of another version.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InvalidOption(f"{path} cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise InvalidOption(
                f"{path} is no text, and so no trace: give a file that --trace has written."
            ) from error
        events = [_parse(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
        if not events:
            raise InvalidOption(f"{path} is empty: give a file that --trace has written.")
        return cls(events, path.name if title is None else title)

    def html(self) -> str:
        """The page, whole."""
        assets = files("minipaged") / "assets" / "replay"
        parts = {name: (assets / name).read_text("utf-8") for name in _ASSETS}
        parts |= {"title": html.escape(self.title), "trace": self._trace()}
        page = (assets / "replay.html").read_text("utf-8")
        # In one pass, so that a title or a request named "{{trace}}" stays what it is.
        return re.sub(r"\{\{([\w.]+)\}\}", lambda name: parts[name[1]], page)

    def save(self, path: str | Path) -> None:
        """Write the page to a file that is whole or absent. Raises InvalidOption."""
        write_atomically(Path(path), self.html())

    def _repr_html_(self) -> str:
        """What a notebook shows: the page in a frame of its own."""
        title, page = html.escape(self.title), html.escape(self.html())
        return (
            f'<iframe class="replay" title="{title}" srcdoc="{page}" loading="lazy" '
            f'style="width: 100%; height: {FRAME_HEIGHT}px; border: 0"></iframe>'
        )

    def _trace(self) -> str:
        """The events as JSON that can stand in a script element: nothing in it ends the element."""
        events = ",\n".join(event.to_json() for event in self.events)
        return f"[{events}]".replace("<", "\\u003c")


_ASSETS = ("replay.css", "state.js", "blocks.js", "replay.js")


def _parse(path: Path, number: int, line: str) -> Event:
    """One line of a trace. Raises InvalidOption, and says which line."""
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidOption(
            f"{path} is damaged: line {number} is not JSON. Record the trace again."
        ) from error
    if not isinstance(fields, dict) or "v" not in fields:
        raise InvalidOption(
            f"{path} is no trace: line {number} is not an event of minipaged. "
            "Give a file that --trace has written."
        )
    if fields["v"] != SCHEMA_VERSION:
        raise InvalidOption(
            f"{path} has events of version {fields['v']!r} in line {number}, and only version "
            f"{SCHEMA_VERSION} is known here: record the trace again."
        )
    event, step, time = (fields.pop(name, None) for name in ("event", "step", "time"))
    del fields["v"]
    if not (isinstance(event, str) and type(step) is int and isinstance(time, int | float)):
        raise InvalidOption(
            f"{path} is damaged: line {number} lacks event, step or time. Record the trace again."
        )
    return Event(event, step, time, fields)
