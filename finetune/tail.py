"""The tail checkpoint: a member's own last layers and final norm (tail.safetensors) and its manifest (tail.json)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..runtime.bundle import file_digest
from ..runtime.errors import BundleError, ConfigError, NotFoundError

FORMAT = 1
MANIFEST = "tail.json"
WEIGHTS = "tail.safetensors"


def write_tail(out: Path, manifest: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Write a tail directory, as a whole or not at all. Raises `ConfigError` if `out` is something else already."""
    if out.exists() and not (out / MANIFEST).is_file():
        raise ConfigError(f"'{out}' exists and is not a tail; choose another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, work / WEIGHTS)
        values = {"format": FORMAT, "kind": "tail", **manifest, "sha256": file_digest(work / WEIGHTS)}
        (work / MANIFEST).write_text(json.dumps(values, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_tail(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(manifest, weights under canonical names). Raises `NotFoundError`, `BundleError` (damaged, unknown version)."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise NotFoundError(f"there is no tail at '{path}' ({MANIFEST} is missing); `motet tune` makes one")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT or manifest["kind"] != "tail":
            raise BundleError(f"'{path / MANIFEST}' has format {manifest['format']!r}; this version reads {FORMAT}")
        if file_digest(path / WEIGHTS) != manifest["sha256"]:
            raise BundleError(f"'{path / WEIGHTS}' is damaged: its digest is not the manifest's; tune it again")
        return manifest, load_file(path / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BundleError(f"the tail at '{path}' is damaged ({error!r}); tune it again") from error
