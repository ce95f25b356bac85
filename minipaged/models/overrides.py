"""The option hf_overrides: values that replace those of config.json."""

from collections.abc import Mapping
from typing import Any

from minipaged.errors import InvalidOption
from minipaged.utils.options import shown


class Overridden(dict[str, Any]):
    """A parsed config.json with some values replaced, which records the names that were read."""

    def __init__(self, hf: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
        super().__init__({**hf, **overrides})
        self._overrides = overrides
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return super().get(name, default)

    def refuse_unread(self) -> None:
        """Raise InvalidOption for an override of a value that is never read."""
        for name in self._overrides:
            if name not in self._read:
                raise InvalidOption(
                    f"hf_overrides sets {shown(name)}, which this architecture "
                    f"({self['architectures'][0]}) does not read from config.json: correct the "
                    "name, or leave it out.",
                    "hf_overrides",
                )
