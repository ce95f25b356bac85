"""Parameters of vLLM and Hugging Face that are recognised but not supported.

A script may pass one with its neutral value. Any other value is refused in one sentence. A table
has a reason for each group, and the neutral value of each name:

    {"LoRA adapters are not built": {"enable_lora": False, "default_mm_loras": None}}

None and empty values are always neutral. A tuple lists several neutral values.
"""

from collections.abc import Iterable, Mapping

from minipaged.errors import InvalidOption
from minipaged.utils.options import refuse_unknown, shown

Table = Mapping[str, Mapping[str, object]]
ByName = Mapping[str, tuple[str, object]]  # the reason, and the neutral value


def by_name(table: Table) -> ByName:
    """Return the reason and the neutral value of each name in a table."""
    return {name: (why, value) for why, names in table.items() for name, value in names.items()}


def refuse_not_built(name: str, value: object, table: ByName, known: Iterable[str]) -> None:
    """Refuse a name that is not in the table, and a value that is not neutral.

    Args:
        known: the supported names, which the error for an unknown name lists.

    Raises InvalidOption.
    """
    refuse_unknown([name], list(known), also=table)
    reason, harmless = table[name]
    if not _asks_for_nothing(value, harmless):
        advice = "leave it out" if harmless is None else f"leave it out, or give {named(harmless)}"
        raise InvalidOption(f"{name} is {shown(value)}, but {reason}: {advice}.", name)


def named(harmless: object) -> str:
    """Return the neutral value or values as text."""
    return " or ".join(map(repr, harmless)) if isinstance(harmless, tuple) else repr(harmless)


def _asks_for_nothing(value: object, harmless: object) -> bool:
    if value is None or (isinstance(value, str | dict | list | tuple | set) and not value):
        return True
    if isinstance(harmless, tuple):
        return any(_asks_for_nothing(value, each) for each in harmless)
    # Types first: comparing an array returns an array, and True is not a number.
    same_kind = isinstance(value, bool) == isinstance(harmless, bool)
    return isinstance(value, bool | int | float | str | dict) and same_kind and value == harmless
