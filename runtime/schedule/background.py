"""How batch work runs beside other work: it hardly makes a step longer, and it goes on."""

from __future__ import annotations

from collections.abc import Collection

from .drafts import ROW_COST
from .sequence import Group

SHARE = 1 / 8  # of a step
EVERY = 128  # steps: more than a hundred, so that the 99th percentile of a token's time does not see it


def background(groups: Collection[Group]) -> list[Group]:
    """Those of batch work, in their order."""
    return [group for group in groups if group.owner.is_background]


def foreground(groups: Collection[Group]) -> list[Group]:
    """Those of other work, in their order."""
    return [group for group in groups if not group.owner.is_background]


def spare_rows(rows: int) -> int:
    """Rows of batch work in a step with `rows` rows of other work that make it at most an eighth longer; at least one, so that
    batch work goes on."""
    return max(1, int(SHARE * (1 + ROW_COST * (rows - 1)) / ROW_COST))


class BackgroundTurns:
    """When batch work beside other work computes a chunk of a prompt, and when it draws. Call `next_step` before each step."""

    def __init__(self) -> None:
        self._since_chunk = 0  # steps
        self._saved = 0  # rows that earlier steps had for batch work, and that were too few for its next group
        self._is_counted = False  # this step's rows are among them

    def next_step(self) -> None:
        self._since_chunk += 1
        self._is_counted = False

    @property
    def may_prefill(self) -> bool:
        return self._since_chunk >= EVERY

    def prefilled(self) -> None:
        self._since_chunk = 0

    def may_draw(self, rows: int, count: int) -> bool:
        """Whether the next group of batch work, of `count` rows, may draw beside `rows` rows. A group of many rows waits until
        so many steps together have them."""
        if not self._is_counted:
            self._is_counted = True
            room = spare_rows(rows)
            self._saved = min(self._saved + room, max(room, count))
        if count > self._saved:
            return False
        self._saved -= count
        return True
