"""A trace as one page; a placeholder until the visualiser comes."""

from collections.abc import Iterable

from minipaged.events import Event


class Replay:
    """The events of a run."""

    def __init__(self, events: Iterable[Event], title: str = "") -> None:
        self.events = list(events)
        self.title = title

    def _repr_html_(self) -> str:
        return f"<p>{self.title}: {len(self.events)} events</p>"
