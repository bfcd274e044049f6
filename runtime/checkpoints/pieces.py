"""What the tokenizers of GGUF files and of SentencePiece files have in common: pieces with types and scores."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from tokenizers import processors

from ..errors import DataError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of a piece
_LONGEST, _MOST_PAIRS = 2**10, 2**23
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # the pieces that stand for one byte each


def merges_by_score(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best score first; `scores`: of the pieces that may be merged.

    SentencePiece merges the leftmost one of equal pairs. Two pairs that make the same piece can overlap ("ab" + "a" + "ba"),
    so the one that would stand on the left comes first here.
    """
    found: list[tuple[float, int, int, bool, int, tuple[str, str]]] = []
    for piece, score in scores.items():
        if len(piece) > _LONGEST or len(found) > _MOST_PAIRS:
            raise DataError(
                f"the vocabulary has a piece of {len(piece)} characters and {len(found)} pairs that make pieces so far; at most "
                f"{_LONGEST} and {_MOST_PAIRS} are read; fetch the file again"
            )
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in scores and right in scores:
                found.append((-score, ids[piece], *_place(piece, at), (left, right)))
    return [pair for *_, pair in sorted(found)]


def _place(piece: str, at: int) -> tuple[int, bool, int]:
    """The order among the pairs that make one piece, which is cut at `at`."""
    other = len(piece) - at
    is_left = piece[at:] == piece[:other]  # its right part begins a second one
    return min(at, other), not is_left, other


def around(path: object, ids: Mapping[str, int], bos: str | None, eos: str | None) -> processors.PostProcessor | None:
    """What puts the token `bos` in front of each text, and `eos` behind it; None if there is neither. Raises `DataError` for
    a text that is no token."""
    for name, token in (("bos_token", bos), ("eos_token", eos)):
        # A template has no way to write some texts.
        if token is not None and (token not in ids or not token or token.startswith("$") or re.search(r"[\s:]", token)):
            raise DataError(f"'{path}' adds {name} to each text, and it is {shown(token)}")
    text: list[str] = [token for token in (bos, "$A", eos) if token is not None]
    if len(text) == 1:
        return None
    return processors.TemplateProcessing(" ".join(text), None, [(token, ids[token]) for token in {*text} - {"$A"}])


def pairs(path: object, ids: Collection[str], merges: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that are written as "left right". Raises `DataError` if a token is missing."""
    found = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise DataError(f"'{path}' has merges of tokens that it does not have")
        found.append((left, right))
    return found
