"""`MemberFormat`: a member on disk is one safetensors file and one JSON manifest, written as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...errors import BundleError, NotFoundError
from ...model.files import check_replaceable, file_digest, new_directory
from ...model.members import MemberKind

Tensors = Mapping[str, torch.Tensor]


def first_layer(names: Iterable[str], num_layers: int) -> int:
    """The first layer to which any of these tensors (canonical names) belongs; `num_layers` if there is none."""
    return min((int(name.split(".")[2]) for name in names if ".layers." in name), default=num_layers)


@dataclass(frozen=True, slots=True)
class MemberFormat:
    """How a kind of member is stored: `<kind>.json` beside `<kind>.safetensors`.

    `check` raises `BundleError` for tensors that such a member cannot have. `merged(base, tensors)` returns the
    member's changed weights, whole.
    """

    kind: MemberKind
    version: int
    check: Callable[[Tensors], object]
    merged: Callable[[Tensors, Tensors], Tensors]

    @property
    def manifest(self) -> str:
        return f"{self.kind}.json"

    @property
    def weights(self) -> str:
        return f"{self.kind}.safetensors"

    def is_at(self, path: Path) -> bool:
        """Whether the directory holds such a member, intact or damaged."""
        return (path / self.manifest).is_file()

    def check_replaceable(self, out: Path) -> None:
        """Raises `ConfigError` if `out` exists and is something else."""
        check_replaceable(out, self.manifest, f"{self.kind.article} {self.kind}")

    def write(
        self,
        out: Path,
        manifest: Mapping[str, Any],
        weights: Tensors,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Write the directory `out`, as a whole or not at all, with `files` (name → text) beside the weights.

        Raises `ConfigError` if `out` exists and is something else.
        """
        with new_directory(out, self.manifest, f"{self.kind.article} {self.kind}") as work:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, work / self.weights)
            values = {"format": self.version, "kind": self.kind, **manifest, "sha256": file_digest(work / self.weights)}
            (work / self.manifest).write_text(json.dumps(values, indent=1) + "\n")
            for name, text in (files or {}).items():
                (work / name).write_text(text)

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(manifest, tensors). Raises `NotFoundError`, `BundleError` (damaged, unknown version)."""
        path = Path(path)
        if not self.is_at(path):
            raise NotFoundError(
                f"there is no {self.kind} at '{path}' ({self.manifest} is missing); `motet tune` makes one"
            )
        try:
            manifest = json.loads((path / self.manifest).read_bytes())
            if manifest["format"] != self.version or manifest["kind"] != self.kind:
                raise BundleError(
                    f"'{path / self.manifest}' has format {manifest['format']!r}; this version reads {self.version}"
                )
            if file_digest(path / self.weights) != manifest["sha256"]:
                raise BundleError(
                    f"'{path / self.weights}' is damaged: its digest is not the manifest's; tune it again"
                )
            weights = load_file(path / self.weights)
            self.check(weights)
            return manifest, weights
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise BundleError(f"the {self.kind} at '{path}' is damaged ({error!r}); tune it again") from error
