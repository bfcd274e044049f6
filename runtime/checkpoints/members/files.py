"""What a tail and an adapter on disk have in common: one safetensors file, one JSON manifest, written as a whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...errors import BundleError, ConfigError, NotFoundError
from ...model.bundle import file_digest


@dataclass(frozen=True, slots=True)
class CheckpointKind:
    """A kind of member checkpoint: `<name>.json` beside `<name>.safetensors`."""

    name: str
    format: int
    article: str = "a"

    @property
    def manifest(self) -> str:
        return f"{self.name}.json"

    @property
    def weights(self) -> str:
        return f"{self.name}.safetensors"

    def write(
        self,
        out: Path,
        manifest: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Write the directory `out`, as a whole or not at all, with `files` (name → text) beside the weights.

        Raises `ConfigError` if `out` is something else already.
        """
        if out.exists() and not (out / self.manifest).is_file():
            raise ConfigError(f"'{out}' exists and is not {self.article} {self.name}; choose another directory")
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, work / self.weights)
            values = {"format": self.format, "kind": self.name, **manifest, "sha256": file_digest(work / self.weights)}
            (work / self.manifest).write_text(json.dumps(values, indent=1) + "\n")
            for name, text in (files or {}).items():
                (work / name).write_text(text)
            shutil.rmtree(out, ignore_errors=True)
            os.replace(work, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(manifest, tensors). Raises `NotFoundError`, `BundleError` (damaged, unknown version)."""
        path = Path(path)
        if not (path / self.manifest).is_file():
            raise NotFoundError(
                f"there is no {self.name} at '{path}' ({self.manifest} is missing); `motet tune` makes one"
            )
        try:
            manifest = json.loads((path / self.manifest).read_bytes())
            if manifest["format"] != self.format or manifest["kind"] != self.name:
                raise BundleError(
                    f"'{path / self.manifest}' has format {manifest['format']!r}; this version reads {self.format}"
                )
            if file_digest(path / self.weights) != manifest["sha256"]:
                raise BundleError(
                    f"'{path / self.weights}' is damaged: its digest is not the manifest's; tune it again"
                )
            return manifest, load_file(path / self.weights)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise BundleError(f"the {self.name} at '{path}' is damaged ({error!r}); tune it again") from error
