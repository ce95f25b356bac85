"""Values that replace those of config.json: the option hf_overrides."""

from collections.abc import Mapping
from typing import Any

from minipaged.errors import InvalidOption
from minipaged.utils.options import shown


class Overridden(dict[str, Any]):
    """A parsed config.json with some values replaced. It remembers which names were read."""

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
                    f"hf_overrides sets {shown(name)}, which is not read of the config.json of "
                    f"this architecture ({self['architectures'][0]}): correct the name, or leave "
                    "it out.",
                    "hf_overrides",
                )
