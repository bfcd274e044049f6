"""`Drafter`: guesses the next tokens of an answer from an earlier place in the text that has the same last tokens.

Prompt-lookup drafts (Saxena 2023; verified as in Leviathan et al. 2023): an answer that copies from its prompt, or
repeats itself, is read off the earlier text and verified in one step. The last two tokens are looked up in an index
of all pairs in prompt and answer. As long as the answer follows the place that was found, the place moves on with it,
token by token.

Every drawn token is compared with the guess, whether or not it was drafted, so it is known how often guesses are right.
A group whose text cannot be guessed costs no rows, and one that begins to copy gets drafts at once, without trials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
Ids = TypeVar("Ids", int, I64)

# A step that reads all weights for one row costs 1; each further row adds this (measured on two cores with 1 to 32
# rows: 0.13 with 4-bit weights, 0.06 with 8 bits). Adding a row pays if its chance of a token is above its share of
# the step's cost.
ROW_COST = 0.1
MARGIN = 1.25  # what is not in the model: sampling a row, the gaps between steps

# A new group's chances that the next token is guessed right, by how many tokens have matched so far.
_MATCHED = (3, 6)
_CHANCES = (0.4, 0.6, 0.8)
_LEARNING_RATE = 1 / 8


@dataclass(slots=True)
class StepLoad:
    """The expected tokens and the rows of the step so far."""

    rows: int
    tokens: float  # expected

    def price(self, rows: int) -> float:
        """The chance of a token above which `rows` more rows raise the tokens per second."""
        cost = 1 + ROW_COST * (self.rows - 1)
        return MARGIN * ROW_COST * rows * self.tokens / cost


class Drafter:
    """Drafts for one group. Call `observe` after every token. `max_tokens` is the longest draft a caller should ask for; it is
    not enforced here."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._ends: dict[int, int] = {}  # pair of tokens → index of the token after its latest occurrence
        self._guess: int | None = None  # index of the token that is expected next
        self._matched = 0  # how many tokens before it equal the last ones of the text
        self._chances = list(_CHANCES)

    def observe(self, text: I64) -> None:
        """`text` [tokens]: prompt and answer. It has one token more than at the last call (any number at the first)."""
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
        """A draft of at most `limit` tokens that pays in a step with this load; often empty. It is added to `load`."""
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
        return np.resize(known, size) if size else known  # past the end of the text, a draft repeats itself


def _pair(first: Ids, second: Ids) -> Ids:
    """Two token ids as one number; of two arrays, elementwise."""
    return (first << 32) | second


def _bucket(matched: int) -> int:
    return sum(matched >= limit for limit in _MATCHED)
