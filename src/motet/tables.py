"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table; the first column is left-aligned, the others hold figures and are right-aligned."""
    result = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        result.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result
