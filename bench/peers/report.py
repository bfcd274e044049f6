"""The report of `motet bench peers`: the table of speeds, the ratios to the fastest peer, plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...pages import Bars, Table

_OWN = "motet "


def add_ratios(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Add to Motet's rows, for each column, the name of the fastest peer and the ratio to its speed. Changes `rows`."""
    for row in rows:
        if not row["name"].startswith(_OWN):
            continue
        row["fastest_peer"], row["ratio"] = {}, {}
        for column in columns:
            peers = {
                r["name"]: r["tok_s"][column] for r in rows if not r["name"].startswith(_OWN) and column in r["tok_s"]
            }
            if peers and column in row["tok_s"]:
                row["fastest_peer"][column] = fastest = max(peers, key=lambda name: peers[name])
                row["ratio"][column] = row["tok_s"][column] / peers[fastest]


def tables(result: dict[str, Any]) -> list[Table]:
    """The table of speeds, with failures as notes, and the table of ratios."""
    columns: dict[str, str] = result["columns"]
    limits, after = result["limits"], result["limits_after"]
    lines = [
        f"tok/s, {result['threads']} threads, medians of {result['repeats']}; read {limits['read_gb_s']:.0f} GB/s before, "
        f"{after['read_gb_s']:.0f} after; int8 {limits['int8_gmac_s']:.0f} and {after['int8_gmac_s']:.0f} GMAC/s"
    ]
    speeds = []
    for row in result["runtimes"]:
        cells = [f"{row['tok_s'][column]:,.0f}" if column in row["tok_s"] else "–" for column in columns]
        speeds.append([f"{row['name']} {row['version']}".strip(), *cells])
        if row["error"] is not None:
            lines.append(f"{row['name']}: {row['error']}")
        lines += [f"{row['name']}, {columns[column]}: {reason}" for column, reason in row["errors"].items()]
    own = [row for row in result["runtimes"] if row.get("ratio")]
    ratios = [[row["name"], *(f"{row['ratio'][c]:.2f}" if c in row["ratio"] else "–" for c in columns)] for row in own]
    found = [Table("\n".join(lines), ["runtime", *columns.values()], speeds)]
    if own:
        fastest = ["fastest peer", *(own[0]["fastest_peer"].get(column, "–") for column in columns)]
        found.append(Table("× the fastest peer", ["", *columns.values()], [*ratios, fastest]))
    return found


def plots(result: dict[str, Any]) -> list[Bars]:
    """One sorted chart per column, with the runtimes that have a figure there; error bars span the repeats."""
    found = []
    for column, title in result["columns"].items():
        rows = [row for row in result["runtimes"] if column in row["tok_s"]]
        values = {"median": [row["tok_s"][column] for row in rows]}
        spans = {"median": [(min(row["all_tok_s"][column]), max(row["all_tok_s"][column])) for row in rows]}
        found.append(Bars(title, "tok/s", [row["name"] for row in rows], values, spans, ours=_OWN))
    return found
