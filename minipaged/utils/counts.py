"""Numbers with their nouns in messages: "1 block", "2 blocks"."""


def counted(number: float, one: str, many: str = "") -> str:
    """A number and its noun, which agree.

    Args:
        one: the noun, or noun and verb, of a single thing, as "block" or "block has".
        many: the same of several; without it, `one` and an "s".
    """
    noun = one if number == 1 else many or f"{one}s"
    return f"{number:,g} {noun}" if isinstance(number, float) else f"{number:,} {noun}"
