"""Documents: bytes to text, and long ones cut at natural places, so that every piece fits a number of tokens."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError, NotFoundError
from .tokenizer import Tokenizer

_SEPARATORS = ("\n\n", "\n", ". ", " ")


def decode_text(data: bytes, what: str) -> str:
    """UTF-8 to text, without a byte order mark at the beginning. `what` names the data in the error. Raises
    `DataError`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is not UTF-8 at byte {error.start}; convert it to UTF-8") from error


def read_document(path: Path) -> str:
    """The text of a file in UTF-8. Raises `NotFoundError` if it cannot be read, `DataError` if it is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"the file '{path}' cannot be read: {error.strerror}") from error
    return decode_text(data, f"'{path}'")


def split_document(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[str]:
    """Cut `text` into pieces of at most `max_tokens` tokens, each as long as possible. The pieces joined are `text`.

    It cuts between paragraphs where it can, else between lines, sentences or words, and inside a word as a last resort.
    """
    return _split(tokenizer, text, max_tokens, _SEPARATORS)


def _split(tokenizer: Tokenizer, text: str, max_tokens: int, separators: tuple[str, ...]) -> list[str]:
    if _count(tokenizer, text) <= max_tokens or len(text) <= 1:
        return [text]
    if not separators:
        middle = len(text) // 2
        parts = [text[:middle], text[middle:]]
    else:
        parts = [part + separators[0] for part in text.split(separators[0])]
        parts[-1] = parts[-1].removesuffix(separators[0])
    pieces: list[str] = []
    for part in filter(None, parts):
        if pieces and _count(tokenizer, pieces[-1] + part) <= max_tokens:
            pieces[-1] += part
        else:
            pieces += _split(tokenizer, part, max_tokens, separators[1:])
    return pieces


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))
