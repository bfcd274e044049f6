"""What a model's directory, a bundle or an ONNX graph holds, weight by weight, without reading more than a weight at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from ..runtime.checkpoints.huggingface import open_weights, read_config
from ..runtime.errors import BundleError, NotFoundError, UnsupportedModelError, shown
from ..runtime.model.bundle import MANIFEST, WEIGHTS, Bundle
from ..runtime.model.stored import StoredTensor, read_bytes, read_header
from .decoder_graph import find_graph
from .graph_file import is_external, place_of, read_graph


@dataclass(frozen=True, slots=True)
class Weight:
    """`bits` and `group_size` (0: no groups) as it is stored; `num_bytes` with scales and minima. `expected_kl`: what its
    rounding is expected to cost, nats a token; None: it is not known. `digest`: SHA-256 of its bytes, or of its values in float32
    if it is of a model's directory. Of an ONNX graph a weight is an initializer, whatever it is for."""

    name: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    num_bytes: int
    expected_kl: float | None
    digest: str


def inspect(path: Path) -> Iterator[Weight]:
    """The weights of a bundle, of a model's directory under canonical names, or of an ONNX graph (its file, its directory, or a
    bundle of it). Raises `NotFoundError` if it is none of these, and what reading it raises."""
    if (path / MANIFEST).is_file():
        graph = Bundle.load(path, verify=False).decoder_graph
        yield from _bundle(path) if graph is None else _graph(path / graph.file)
    elif (found := find_graph(path)) is not None:
        yield from _graph(found)
    elif (path / "config.json").is_file():
        yield from _model(path)
    else:
        raise NotFoundError(f"'{path}' is no bundle ({MANIFEST}), no model's directory (config.json) and no ONNX graph")


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


def _graph(path: Path) -> Iterator[Weight]:
    """Raises `BundleError` and `NotFoundError` for a graph, or a file of its tensors, that is damaged or missing, and
    `UnsupportedModelError` for tensors elsewhere or of a type without bytes (text)."""
    for tensor in read_graph(path).graph.initializer:
        if tensor.data_type not in _BITS:
            raise UnsupportedModelError(
                f"the initializer {shown(tensor.name)} of '{path}' has the type {tensor.data_type}, which is no number's; export "
                "the graph without it"
            )
        bits, digest = _BITS[tensor.data_type], hashlib.sha256()
        shape = shown(list(tensor.dims))
        if len(tensor.dims) > _MOST_DIMENSIONS or any(size < 0 for size in tensor.dims):
            raise BundleError(
                f"the initializer {shown(tensor.name)} of '{path}' has the shape {shape}; export the graph again"
            )
        size = -(-math.prod(tensor.dims) * bits // 8)
        if is_external(tensor):
            file, offset, length = place_of(tensor, path)
            found = min(size, file.stat().st_size - offset) if length is None else length
        else:
            content = tensor.raw_data if tensor.HasField("raw_data") else _packed(tensor, path)
            found = len(content)
            digest.update(content)
        if found != size:
            raise BundleError(
                f"the initializer {shown(tensor.name)} of '{path}' has {found} bytes, its shape {shape} takes {size}; export the "
                "graph again"
            )
        if is_external(tensor):
            with file.open("rb") as data:
                data.seek(offset)
                while size and (piece := data.read(min(size, _PIECE))):
                    digest.update(piece)
                    size -= len(piece)
        yield Weight(tensor.name, tuple(tensor.dims), bits, 0, found, None, digest.hexdigest())


def _packed(tensor: onnx.TensorProto, path: Path) -> bytes:
    """The bytes that `raw_data` would have, of values that are in a field of numbers."""
    try:
        values = onnx.numpy_helper.to_array(tensor)
        return bytes(onnx.numpy_helper.from_array(values, tensor.name).raw_data)
    except Exception as error:  # onnx and numpy raise many types for values that do not fit their shape
        raise BundleError(
            f"the values of the initializer {shown(tensor.name)} of '{path}' are damaged ({type(error).__name__}); export the "
            "graph again"
        ) from error


# Bits of a value of each numeric type of ONNX.
_BITS = {
    kind: bits
    for bits, names in (
        (2, "UINT2 INT2"),
        (4, "UINT4 INT4 FLOAT4E2M1"),
        (8, "UINT8 INT8 BOOL FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0"),
        (16, "UINT16 INT16 FLOAT16 BFLOAT16"),
        (32, "UINT32 INT32 FLOAT"),
        (64, "UINT64 INT64 DOUBLE COMPLEX64"),
        (128, "COMPLEX128"),
    )
    for name in names.split()
    if (kind := dict(onnx.TensorProto.DataType.items()).get(name)) is not None
}
_MOST_DIMENSIONS = 64  # as many as numpy has
_PIECE = 2**20  # bytes of a tensor that are read together
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
