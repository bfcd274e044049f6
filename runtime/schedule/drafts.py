"""`Drafter`: guesses how an answer goes on from how the text went on where its last tokens stood before.

Prompt-lookup drafts (Saxena 2023; verified as in Leviathan et al. 2023): an answer that copies from its prompt, or repeats
itself, is read off the earlier text and verified in one step. The last two tokens are looked up in an index of all pairs
of prompt and answer; while the answer follows the place that was found, the place moves along, token by token.

How often the guess is right is known whether or not it was drafted: every token that is drawn is compared with it. So a
group whose text cannot be guessed costs no rows, and one that begins to copy is drafted again at once, without trials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
Ids = TypeVar("Ids", int, I64)

# A step that reads all weights for one row costs 1; every row more adds this (measured on two cores with 1 to 32 rows:
# 0.13 with 4-bit weights, 0.06 with 8 bits). It pays to add a row if its chance of a token is above its share of the
# step's cost.
ROW_COST = 0.1
MARGIN = 1.25  # what is not in the model: sampling a row, the gaps between steps

# Chance that the next token is guessed, by how many tokens have matched so far; what a group begins with.
_MATCHED = (3, 6)
_CHANCES = (0.4, 0.6, 0.8)
_LEARNING_RATE = 1 / 8


@dataclass(slots=True)
class StepLoad:
    """What the step yields and costs so far."""

    rows: int
    tokens: float  # expected

    def price(self, rows: int) -> float:
        """The chance of a token above which so many rows more raise tokens per time."""
        cost = 1 + ROW_COST * (self.rows - 1)
        return MARGIN * ROW_COST * rows * self.tokens / cost


class Drafter:
    """Drafts for one group. Call `observe` after every token. `max_tokens` is the longest draft a caller should ask for; it is
    not enforced here."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._ends: dict[int, int] = {}  # pair of tokens → index of the token after its latest occurrence
        self._guess: int | None = None  # index of the token that is expected next
        self._matched = 0  # tokens before it that are equal to the last ones
        self._chances = list(_CHANCES)

    def observe(self, text: I64) -> None:
        """`text` [tokens], prompt and answer, has one token more than the last time (the first time: any number)."""
        if not self._ends:
            keys = _pair(text[:-2], text[1:-1])
            self._ends = dict(zip(keys.tolist(), range(2, len(text)), strict=True))
        if self._guess is not None:
            right = bool(text[self._guess] == text[-1])
            bucket = _bucket(self._matched)
            self._chances[bucket] += _LEARNING_RATE * (right - self._chances[bucket])
            self._guess, self._matched = (self._guess + 1, self._matched + 1) if right else (None, 0)
        key = _pair(int(text[-2]), int(text[-1]))
        if self._guess is None and (found := self._ends.get(key)) is not None:
            self._guess, self._matched = found, 2
        self._ends[key] = len(text)

    def propose(self, text: I64, limit: int, load: StepLoad, num_sequences: int) -> I64:
        """A draft [at most `limit`] that pays in a step with this load, which it is added to; often empty."""
        if self._guess is None:
            return text[:0]
        size, chance = 0, 1.0
        while size < limit:
            chance *= self._chances[_bucket(self._matched + size)]
            if chance < load.price(num_sequences):
                break
            size += 1
            load.rows += num_sequences
            load.tokens += chance
        known = text[self._guess : self._guess + size]
        return np.resize(known, size) if size else known  # a text that repeats itself goes on repeating


def _pair(first: Ids, second: Ids) -> Ids:
    """Two token ids, or each of two columns of them, as one number."""
    return (first << 32) | second


def _bucket(matched: int) -> int:
    return sum(matched >= limit for limit in _MATCHED)
