"""The path of a token in byte-pair encoding: which merges, and which tokens between, make it of its letters."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Path:
    tokens: set[str]  # letters and what stands between, the token itself too
    ranks: set[int]  # of the merges


class Paths:
    """`merges`: pairs in the order of their ranks. Of a pair that is there twice the later rank counts, as in the library that
    reads tokenizer.json."""

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        self._rank = {pair: rank for rank, pair in enumerate(merges)}

    def of(self, token: str) -> Path | None:
        """None if the merges do not make the token of its letters."""
        parts: list[str | None] = list(token)
        following = list(range(1, len(parts) + 1))
        preceding = list(range(-1, len(parts) - 1))
        tokens, ranks = set(token), set()
        waiting: list[tuple[int, int, str, str]] = []

        def offer(left: int) -> None:
            right = following[left] if left >= 0 else len(parts)
            if left < 0 or right >= len(parts):
                return
            pair = parts[left] or "", parts[right] or ""
            if pair in self._rank:
                heapq.heappush(waiting, (self._rank[pair], left, *pair))

        for place in range(len(parts)):
            offer(place)
        while waiting:
            rank, left, first, second = heapq.heappop(waiting)
            if parts[left] != first or following[left] >= len(parts) or parts[following[left]] != second:
                continue  # one of the two was merged meanwhile
            right = following[left]
            parts[left], parts[right] = first + second, None
            following[left] = following[right]
            if following[right] < len(parts):
                preceding[following[right]] = left
            tokens.add(first + second)
            ranks.add(rank)
            offer(preceding[left])
            offer(left)
        return Path(tokens, ranks) if parts and parts[0] == token else None
