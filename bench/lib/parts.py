"""`part`: a part of a long bench, measured once. A bench that is killed goes on with the parts that are left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def part(path: Path, made_from: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures at `path`, if they were made from the same (model, data, budget …), else those that `compute` returns,
    which are written there."""
    made_from = json.loads(json.dumps(made_from))  # as they are read back
    if not path.is_file() or json.loads(path.read_bytes()).get("made_from") != made_from:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(compute() | {"made_from": made_from}, indent=1) + "\n")
        os.replace(new, path)
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found
