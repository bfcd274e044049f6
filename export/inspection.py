"""What a model's directory or a bundle holds, weight by weight, without reading more than a weight at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime.checkpoints.huggingface import open_weights, read_config
from ..runtime.errors import NotFoundError
from ..runtime.model.bundle import MANIFEST, WEIGHTS, Bundle
from ..runtime.model.stored import StoredTensor, read_bytes, read_header


@dataclass(frozen=True, slots=True)
class Weight:
    """`bits` and `group_size` (0: no groups) as it is stored; `num_bytes` with scales and minima. `expected_kl`: what its
    rounding is expected to cost, nats a token; None: it is not known. `digest`: SHA-256 of its bytes, or of its values in float32
    if it is of a model's directory."""

    name: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    num_bytes: int
    expected_kl: float | None
    digest: str


def inspect(path: Path) -> Iterator[Weight]:
    """The weights of a bundle, or of a model's directory under canonical names. Raises `NotFoundError` if it is neither, and what
    reading it raises."""
    if (path / MANIFEST).is_file():
        yield from _bundle(path)
    elif (path / "config.json").is_file():
        yield from _model(path)
    else:
        raise NotFoundError(f"'{path}' is no bundle ({MANIFEST}) and no model's directory (config.json)")


def _model(path: Path) -> Iterator[Weight]:
    read_config(path)
    with open_weights(path) as weights:
        for name in weights:
            values = weights[name].numpy()
            digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
            yield Weight(name, values.shape, 32, 0, values.nbytes, None, digest)


def _bundle(path: Path) -> Iterator[Weight]:
    expected = Bundle.load(path, verify=False).quantisation.get("expected_kl") or {}
    with (path / WEIGHTS).open("rb") as file:
        tensors = read_header(file, path / WEIGHTS)
        for name in dict.fromkeys(_weight_name(tensor) for tensor in tensors):
            parts = {kind: tensors[f"{name}{kind}"] for kind in _KINDS if f"{name}{kind}" in tensors}
            digest = hashlib.sha256()
            for tensor in parts.values():
                digest.update(read_bytes(file, path / WEIGHTS, tensor).data)
            size = sum(tensor.length for tensor in parts.values())
            yield Weight(name, *_stored_as(parts), size, expected.get(name), digest.hexdigest())


_KINDS = ("", ".values", ".scales", ".minima")


def _weight_name(tensor: str) -> str:
    base, dot, kind = tensor.rpartition(".")
    return base if f"{dot}{kind}" in _KINDS[1:] else tensor


def _stored_as(parts: dict[str, StoredTensor]) -> tuple[tuple[int, ...], int, int]:
    """(shape, bits, group size)."""
    if "" in parts:
        return parts[""].shape, 8 * parts[""].length // max(1, int(np.prod(parts[""].shape))), 0
    rows, groups, size = parts[".values"].shape
    bits = 4 if ".minima" in parts else 8
    group = size * 8 // bits
    return (rows, groups * group), bits, group
