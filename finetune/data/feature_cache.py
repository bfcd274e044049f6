"""The feature cache: what the towers of encoders make of images and sounds, computed once and read by every run.

An entry is a safetensors file, named by a digest of (tower, its settings, content of the image or sound):

    features       bfloat16 [runs, rows, width], what the projector gets; memory-mapped
    __metadata__   SHA-256 of the features

It is written whole or not at all. The least recently used entries are removed if the cache would exceed its bound; those that a
run has read stay readable, because what is mapped outlives its name.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...runtime.errors import ConfigError, UnavailableError

_NAME = "features"


class FeatureCache:
    """Entries under `root`, together at most `max_bytes`."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self.max_bytes = root, max_bytes
        self._used: set[str] = set()  # entries of this run, which are not removed for others of it
        self._total = self.max_bytes  # bytes of all entries, at most: they are counted when that might be too many

    def read(self, key: str) -> Tensor | None:
        """[runs, rows, width] bfloat16, a view of a file; None if there is no intact entry."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                said = (file.metadata() or {}).get("sha256")
                features: Tensor = file.get_tensor(_NAME)
            with suppress(OSError):  # an entry of another user
                os.utime(path)
        except OSError:
            return None
        except SafetensorError:
            path.unlink(missing_ok=True)
            return None
        if features.dtype != torch.bfloat16 or features.ndim != 3 or _digest(features) != said:
            path.unlink(missing_ok=True)
            return None
        self._used.add(path.name)
        return features

    def write(self, key: str, features: Tensor) -> Tensor:
        """Keep an entry, and return it as `read` does. Raises `ConfigError` if what a run needs is larger than the bound,
        `UnavailableError` if the disk is full."""
        path = self._path(key)
        content = features.to(torch.bfloat16).contiguous()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._make_room(content.nbytes)
            work = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
            try:
                save_file({_NAME: content}, work, {"sha256": _digest(content)})
                os.replace(work, path)
            finally:
                work.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise UnavailableError(
                f"the feature cache at '{self.root}' cannot be written ({error}); make room or choose another --cache; what is "
                "written is kept and the next run goes on from there"
            ) from error
        found = self.read(key)
        return content if found is None else found  # another process has removed it

    def _path(self, key: str) -> Path:
        return self.root / f"{key}.safetensors"

    def _make_room(self, size: int) -> None:
        """Remove the least recently used entries until `size` more bytes are within the bound."""
        self._total += size
        if self._total <= self.max_bytes:
            return
        entries = {}
        for path in self.root.glob("*.safetensors"):
            try:
                entries[path] = path.stat()
            except FileNotFoundError:
                continue
        self._total = size + sum(entry.st_size for entry in entries.values())
        for path in sorted(entries, key=lambda p: entries[p].st_mtime):
            if self._total > self.max_bytes and path.name not in self._used:
                path.unlink(missing_ok=True)
                self._total -= entries[path].st_size
        if self._total > self.max_bytes:
            raise ConfigError(
                f"the feature cache may hold {self.max_bytes / 1e9:.2f} GB, and the media of this data set take more; raise "
                "--cache-gb, or take fewer or smaller ones"
            )


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.view(torch.uint8).numpy().data).hexdigest()
