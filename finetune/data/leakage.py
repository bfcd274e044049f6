"""Near-duplicates between the training set and the held-out sets.

Two examples are near-duplicates if their sets of word 5-grams have a Jaccard similarity of at least 0.8, as in Lee et al.
2022. The search is exact: it uses an inverted index of the held-out examples' 5-grams, not a random sketch.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from .example import Example

SIMILARITY = 0.8
_WORDS = 5


def near_duplicates(train: Sequence[Example], held_out: Sequence[Example]) -> list[tuple[int, int]]:
    """(index in `train`, index in `held_out`): one pair for each training example that has a near-duplicate."""
    index: dict[int, list[int]] = defaultdict(list)
    sizes = []
    for number, example in enumerate(held_out):
        shingles = _shingles(example)
        sizes.append(len(shingles))
        for shingle in shingles:
            index[shingle].append(number)
    found = []
    for number, example in enumerate(train):
        shingles = _shingles(example)
        shared = Counter(other for shingle in shingles for other in index.get(shingle, ()))
        for other, count in shared.items():
            if count >= SIMILARITY * (len(shingles) + sizes[other] - count):
                found.append((number, other))
                break
    return found


def _shingles(example: Example) -> set[int]:
    words = re.findall(r"\w+", f"{example.prompt} {example.completion}".lower())
    if len(words) <= _WORDS:
        return {hash(tuple(words))}
    return {hash(tuple(words[i : i + _WORDS])) for i in range(len(words) - _WORDS + 1)}
