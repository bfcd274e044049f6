"""How the OpenMP threads of PyTorch wait for each other."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# What a user may have set: libgomp, which PyTorch's wheels have, reads the first two; libiomp the first and the last.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads sleep while they wait, unless the user chose otherwise. By default they spin: beside another busy process
    they take the core from the thread that they wait for. Call it before torch is imported: OpenMP reads it once."""
    if not any(name in environment for name in _SETTINGS):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
