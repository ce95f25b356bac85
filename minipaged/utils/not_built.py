"""Parameters of vLLM and Hugging Face that are known here, but not built.

A script may pass one with the value that asks for nothing. Any other value is refused in one
sentence. A table of them has a reason for each group, and the harmless value of each name:

    {"LoRA adapters are not built": {"enable_lora": False, "default_mm_loras": None}}

None, and whatever is empty, asks for nothing in any case. A tuple lists several harmless values.
"""

from collections.abc import Iterable, Mapping

from minipaged.errors import InvalidOption
from minipaged.utils.options import refuse_unknown, shown

Table = Mapping[str, Mapping[str, object]]
ByName = Mapping[str, tuple[str, object]]  # the reason, and the harmless value


def by_name(table: Table) -> ByName:
    """The reason and the harmless value of each name in a table."""
    return {name: (why, value) for why, names in table.items() for name, value in names.items()}


def refuse_not_built(name: str, value: object, table: ByName, known: Iterable[str]) -> None:
    """Refuse a name that is not in the table, and a value that asks for what is not built.

    Args:
        known: the names that are built, which a refusal of an unknown name lists.

    Raises InvalidOption.
    """
    refuse_unknown([name], list(known), also=table)
    reason, harmless = table[name]
    if not _asks_for_nothing(value, harmless):
        advice = "leave it out" if harmless is None else f"leave it out, or give {named(harmless)}"
        raise InvalidOption(f"{name} is {shown(value)}, but {reason}: {advice}.", name)


def named(harmless: object) -> str:
    """The harmless value or values as text."""
    return " or ".join(map(repr, harmless)) if isinstance(harmless, tuple) else repr(harmless)


def _asks_for_nothing(value: object, harmless: object) -> bool:
    if value is None or (isinstance(value, str | dict | list | tuple | set) and not value):
        return True
    if isinstance(harmless, tuple):
        return any(_asks_for_nothing(value, each) for each in harmless)
    # Types first: an array compares to an array, and True is no number.
    same_kind = isinstance(value, bool) == isinstance(harmless, bool)
    return isinstance(value, bool | int | float | str) and same_kind and value == harmless
