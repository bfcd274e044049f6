"""Make `motet` importable from this tree without installing it: for a machine that has the packages but no installer.

The public face is not run (it needs the server's packages); its folders are there under their names.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

FOLDERS = ("runtime", "kernels", "export", "finetune", "bench")


def use() -> Path:
    """Put `motet` and its folders into `sys.modules`; returns the tree's root. Does nothing where motet is installed."""
    root = Path(__file__).resolve().parents[2]
    if importlib.util.find_spec("motet") is not None:
        return root
    package = types.ModuleType("motet")
    package.__path__ = [str(root / "src" / "motet")]
    sys.modules["motet"] = package
    for folder in FOLDERS:
        name, where = f"motet.{folder}", root / folder
        spec = importlib.util.spec_from_file_location(
            name, where / "__init__.py", submodule_search_locations=[str(where)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        setattr(package, folder, module)
    return root
