"""The tail checkpoint: a member's own last layers and final norm (tail.safetensors), and its manifest (tail.json)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...model.members import MemberKind
from .files import MemberFormat

TAIL = MemberFormat(MemberKind.TAIL, 1, "tail.safetensors")


def write_tail(
    out: Path,
    manifest: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a tail directory, as a whole or not at all. Raises `ConfigError` if `out` exists and is something else."""
    TAIL.write(out, manifest, weights, files)


def read_tail(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(manifest, weights under canonical names). Raises `NotFoundError`, `BundleError` (damaged, unknown version)."""
    return TAIL.load(path)
