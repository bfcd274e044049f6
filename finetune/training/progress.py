"""What a long command shows on stderr: bars on a terminal; elsewhere, such as in a log, lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from .loop import Watch

INTERVAL_S = 30.0  # between two lines about the same work, at least


@dataclass(slots=True)
class _Work:
    total: int
    started: float
    reported: float  # when the last line was written
    done: int = 0


class Progress:
    """A context manager. `show` false: nothing is shown. Bars disappear when they are done."""

    def __init__(self, show: bool = True) -> None:
        is_terminal = sys.stderr.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, console=Console(stderr=True), disable=not (show and is_terminal), transient=True)
        self._has_lines = show and not is_terminal
        self._show = show
        self._works: dict[str, _Work] = {}
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        """Show a line that a user should know of."""
        if self._show:
            self._bars.console.print(f"motet: {text}", highlight=False, soft_wrap=True, markup=False)

    def advance(self, what: str, count: int, total: int) -> None:
        """`count` more of `total` examples of `what` are done."""
        work = self._work(what, total)
        work.done += count
        self._bars.update(self._tasks[what], completed=work.done)
        if self._is_due(work) and count:
            self.note(f"{what}: {work.done}/{total} examples, {_left(work, work.done / total)}")

    def training(self, name: str, tokens: Sequence[int]) -> Watch:
        """The watch of a run `name` whose batches have these numbers of tokens."""
        total = len(tokens)
        work = self._works[name] = self._start(name, total)
        first: list[int] = []  # batches that were done when the run was resumed
        if self._has_lines:
            self.note(f"{name}: {total} batches, {sum(tokens)} tokens")

        def stepped(done: int, loss: float) -> None:
            if not first:
                first.append(done - 1)
            work.done = done
            self._bars.update(self._tasks[name], completed=done, description=f"{name}, loss {loss:.3f}")
            if self._is_due(work):
                past, ahead = sum(tokens[first[0] : done]), sum(tokens[done:])
                speed = past / (work.reported - work.started)
                self.note(
                    f"{name}: {done}/{total} batches, loss {loss:.3f}, {speed:.0f} tokens/s, "
                    + _left(work, past / (past + ahead))
                )

        def validated(done: int, loss: float) -> None:
            if self._has_lines:
                self.note(f"{name}: {done}/{total} batches, validation loss {loss:.3f}")

        return Watch(stepped, validated)

    def _work(self, what: str, total: int) -> _Work:
        if what not in self._works or self._works[what].done >= self._works[what].total:
            self._works[what] = self._start(what, total)
        return self._works[what]

    def _start(self, what: str, total: int) -> _Work:
        for name in [name for name, work in self._works.items() if name in self._tasks and work.done >= work.total]:
            self._bars.remove_task(self._tasks.pop(name))
        self._tasks[what] = self._bars.add_task(what, total=total)
        now = time.monotonic()
        return _Work(total, now, now)

    def _is_due(self, work: _Work) -> bool:
        now = time.monotonic()
        if not self._has_lines or now - work.reported < INTERVAL_S:
            return False
        work.reported = now
        return True


def _left(work: _Work, share: float) -> str:
    """How long the rest takes if `share` took until now."""
    seconds = (work.reported - work.started) * (1 - share) / share
    return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"
