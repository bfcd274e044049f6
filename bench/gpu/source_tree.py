"""Make `motet` importable from this tree without installing it: for a machine that has the packages but no installer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def use() -> Path:
    """Put `motet` into `sys.modules`, with the tree's folders as its own; returns the tree's root. Does nothing where motet
    is installed."""
    root = Path(__file__).resolve().parents[2]
    if importlib.util.find_spec("motet") is not None:
        return root
    source = root / "src" / "motet"
    spec = importlib.util.spec_from_file_location(
        "motet", source / "__init__.py", submodule_search_locations=[str(source), str(root)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["motet"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["motet"])
    return root
