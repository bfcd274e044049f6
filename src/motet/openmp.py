"""How the OpenMP threads of PyTorch wait for each other."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# libgomp, which PyTorch's wheels for Linux have, reads the first two; libomp the first and the last.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SPINS = "3000"  # about 0.1 ms: longer than the wait for a thread that has a core, far below a scheduler's time slice


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads sleep soon while they wait, unless the user chose otherwise. By default they spin: beside another busy
    process they take the core from the thread that they wait for. To sleep at once would cost an idle machine an eighth.
    Call it before torch is imported: OpenMP reads it once."""
    if not any(name in environment for name in _SETTINGS):
        environment.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT=_SPINS)
