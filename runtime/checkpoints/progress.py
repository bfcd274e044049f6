"""Progress bars on a terminal, and lines where there is none."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

_PARTS = 10  # lines of a task without a terminal


class LineProgress(Progress):
    """`rich.progress.Progress` that prints lines to stderr if that is no terminal: one for each tenth of a task that
    is done, or one when it begins if its length is not known, so that a log shows what happens."""

    def __init__(self, *columns: ProgressColumn, disable: bool = False, transient: bool = False) -> None:
        console = Console(stderr=True, soft_wrap=True)
        self._as_lines = not disable and not console.is_terminal
        self._printed: dict[TaskID, int] = {}
        super().__init__(*columns, console=console, disable=disable or not console.is_terminal, transient=transient)

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        task_id = super().add_task(description, *args, **kwargs)
        if self._as_lines and not self._tasks[task_id].total:
            self._print(description)
        return task_id

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        super().update(task_id, *args, **kwargs)
        self._print_part(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print_part(task_id)

    def _print_part(self, task_id: TaskID) -> None:
        task = self._tasks[task_id]
        if not self._as_lines or not task.total:
            return
        part = int(_PARTS * min(task.completed / task.total, 1.0))
        if part > self._printed.get(task_id, 0):
            self._printed[task_id] = part
            self._print(f"{task.description}: {100 * part // _PARTS} %")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)
