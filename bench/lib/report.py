"""Reports: tables in the terminal, a JSON file, a self-contained HTML page with plots, and one JSON line at the end."""

from __future__ import annotations

import html
import json
import platform
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from ...pages import Part, Table, as_json, from_json, page
from ...runtime.errors import DataError
from ...tables import table


def machine() -> dict[str, Any]:
    """The machine that the figures are measured on: CPU, its relevant flags, cores, versions."""
    info: dict[str, Any] = {"machine": platform.machine(), "python": platform.python_version()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        values = {key.strip(): value.strip() for key, value in fields.items()}
        info["cpu"] = (
            f"{values.get('model name', '')} family {values.get('cpu family', '')} model {values.get('model', '')}"
        )
        info["cores"] = sum(line.startswith("processor") for line in lines)
        flags = values.get("flags", "").split()
        info["flags"] = [
            flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags
        ]
    info["versions"] = {name: metadata.version(name) for name in ("motet", "onnxruntime", "numpy")}
    return info


def write(name: str, result: dict[str, Any], parts: Sequence[Part], out: Path) -> None:
    """Write `out/name.json`, its page `out/name.html` and the list of all pages, print the tables, then the result as one
    line of JSON. The file also holds the page's parts, under "page", for `draw`."""
    out.mkdir(parents=True, exist_ok=True)
    content = {**result, "page": [as_json(part) for part in parts]}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(out, [name])
    # A pipe has no width, and rich's default of 80 columns would cut figures off.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in parts:
        if isinstance(part, Table):
            console.print(table(part.title, part.header, part.rows))
    print(json.dumps({"bench": name, **result}), flush=True)


def draw(out: Path, names: Collection[str] | None = None) -> int:
    """Draw the pages of these results of a directory (default: of all), and `index.html`, which lists all of them.

    Returns how many results there are. Raises `DataError` if a file is no result.
    """
    rows = []
    for path in sorted(out.glob("*.json")):
        try:
            result = json.loads(path.read_bytes())
            parts = [from_json(values) for values in result.pop("page", [])]
            found = result.get("machine", {})
            where = f"{found['cpu']}, {found['cores']} cores" if "cpu" in found else found.get("device", "")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a result of `motet bench`: {error!r}") from error
        if names is None or path.stem in names:
            data = html.escape(json.dumps(result, indent=1))
            back = '<p><a href="index.html">All results</a></p>'
            details = f"<details><summary>Data</summary><pre>{data}</pre></details>"
            path.with_suffix(".html").write_text(page(f"motet bench {path.stem}", [back, *parts, details]))
        link = f'<th scope="row"><a href="{path.stem}.html">{html.escape(path.stem)}</a></th>'
        rows.append(f'<tr>{link}<td class="text">{html.escape(where)}</td><td><a href="{path.name}">JSON</a></td></tr>')
    head = '<thead><tr><th scope="col">result</th><th scope="col" class="text">machine</th><th scope="col">data</th></tr></thead>'
    body = f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'
    (out / "index.html").write_text(page("motet bench: all results", [body]))
    return len(rows)
