"""The bytes that an entry of a vocabulary stands for."""

from __future__ import annotations

import re

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # of vocabularies that fall back to bytes
_SPACE = "\u2581"  # how they write a space


def byte_letters() -> dict[str, int]:
    """GPT-2's letter of each byte: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = byte_letters()


def bytes_of(token: str, is_byte_level: bool) -> bytes:
    """`is_byte_level`: the vocabulary is written in GPT-2's letters."""
    if is_byte_level and all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    if found := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace(_SPACE, " ").encode()
