"""GPT-2's letters for bytes, so that a JSON file can contain tokens that are not valid text.

A byte that is a visible character in Latin-1 is that character; all others, in order, are the
characters from U+0100 on. So a space is "\u0120".
"""


def _byte_characters() -> dict[str, int]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def spell_bytes(token: bytes) -> str:
    """A token as `tokenizer.json` spells it: one letter for each of its bytes."""
    return "".join(CHARACTER_OF_BYTE[byte] for byte in token)
