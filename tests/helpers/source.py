"""The source of Motet, to build from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .sanitised import ROOT

WITHOUT_COMPILER = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}


def copy_source(destination: Path) -> Path:
    """A copy as of a fresh clone: a build in the tree would find objects that are there already."""
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__", "results")
    return shutil.copytree(ROOT, destination, ignore=ignored)
