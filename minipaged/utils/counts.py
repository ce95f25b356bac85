"""Numbers with their nouns in messages: "1 block", "2 blocks"."""


def counted(number: float, one: str, many: str = "") -> str:
    """Format a number with its noun in the right form.

    Args:
        one: the singular, with or without a verb, such as "block" or "block has".
        many: the plural; by default `one` with an "s".
    """
    noun = one if number == 1 else many or f"{one}s"
    return f"{number:,g} {noun}" if isinstance(number, float) else f"{number:,} {noun}"
