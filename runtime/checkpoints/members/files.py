"""`MemberFormat`: a member on disk is a safetensors file and a JSON manifest, written as a whole."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...errors import BundleError, NotFoundError
from ...model.config import DecoderConfig
from ...model.files import check_replaceable, file_digest, new_directory
from ...model.members import MemberKind

Tensors = Mapping[str, torch.Tensor]

log = logging.getLogger("motet.checkpoints")


def first_layer(names: Iterable[str], num_layers: int) -> int:
    """The first layer to which any of these tensors (canonical names) belongs; `num_layers` if there is none."""
    return min((int(name.split(".")[2]) for name in names if ".layers." in name), default=num_layers)


def check_base(path: Path, manifest: Mapping[str, Any], digest: str) -> None:
    """Raises `BundleError` if the member at `path` was trained on another base than the one with this digest. An
    adapter that Motet did not write names its base but has no digest of it: a warning is logged."""
    base = manifest["base"]
    if base["digest"] is None:
        log.warning(
            "the adapter '%s' says that its base is '%s', which cannot be verified: Motet did not write it; "
            "only names and shapes are checked",
            path,
            base["name"],
        )
    elif base["digest"] != digest:
        raise BundleError(
            f"the {manifest['kind']} '{path}' was trained on a base with digest {base['digest'][:12]}…, this model has "
            f"{digest[:12]}…; use the base that it was trained on"
        )


@dataclass(frozen=True, slots=True)
class MemberFormat:
    """How a kind of member is stored: the manifest `<kind>.json` beside the tensors in the file `weights`."""

    kind: MemberKind
    version: int
    weights: str

    @property
    def manifest(self) -> str:
        return f"{self.kind}.json"

    def is_at(self, path: Path) -> bool:
        """Whether the directory holds such a member, intact or damaged."""
        return (path / self.manifest).is_file()

    def check_replaceable(self, out: Path) -> None:
        """Raises `ConfigError` if `out` exists and is something else."""
        check_replaceable(out, self.manifest, f"{self.kind.article} {self.kind} that Motet wrote")

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
        with new_directory(out, self.manifest, f"{self.kind.article} {self.kind} that Motet wrote") as work:
            tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(tensors, work / self.weights, metadata={"format": "pt"})
            values = {"format": self.version, "kind": self.kind, **manifest, "sha256": file_digest(work / self.weights)}
            (work / self.manifest).write_text(json.dumps(values, indent=1) + "\n")
            for name, text in (files or {}).items():
                (work / name).write_text(text)

    def read_manifest(self, path: Path) -> dict[str, Any]:
        """The manifest, after a check of the weights' digest. Raises `NotFoundError`, `BundleError` (damaged, unknown
        version)."""
        if not self.is_at(path):
            raise NotFoundError(
                f"there is no {self.kind} at '{path}' ({self.manifest} is missing); `motet tune` makes one"
            )
        with self._reading(path):
            manifest: dict[str, Any] = json.loads((path / self.manifest).read_bytes())
            if manifest["format"] != self.version or manifest["kind"] != self.kind:
                raise BundleError(
                    f"'{path / self.manifest}' has format {manifest['format']!r}; this version reads {self.version}"
                )
            if file_digest(path / self.weights) != manifest["sha256"]:
                raise BundleError(
                    f"'{path / self.weights}' is damaged: its digest is not the one in {self.manifest}; tune it again"
                )
            return manifest

    def load(self, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(manifest, tensors as they are stored). Raises `NotFoundError`, `BundleError` (damaged, unknown version, a
        number that is not finite)."""
        manifest = self.read_manifest(path)
        with self._reading(path):
            stored = load_file(path / self.weights)
        wild = sorted(name for name, tensor in stored.items() if not torch.isfinite(tensor).all())
        if wild:
            raise BundleError(f"the {self.kind} at '{path}' holds NaN or infinity, in {wild[:3]}; tune it again")
        return manifest, stored

    def read(self, path: Path, config: DecoderConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(manifest, tensors under canonical names) of a member whose base has this configuration. Raises what `load`
        raises, and `UnsupportedModelError`."""
        manifest, stored = self.load(path)
        with self._reading(path):
            return manifest, self.canonical(manifest, stored, config)

    def canonical(self, manifest: Mapping[str, Any], stored: Tensors, config: DecoderConfig) -> dict[str, torch.Tensor]:
        """The tensors as Motet names them. Raises `BundleError`, `UnsupportedModelError`."""
        return dict(stored)

    def merged(self, base: Tensors, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The member's changed weights, whole. Raises `BundleError` if it does not fit the base."""
        return dict(tensors)

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise BundleError(f"the {self.kind} at '{path}' is damaged ({error!r}); tune it again") from error
