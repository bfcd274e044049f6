"""What an ONNX file needs beside itself: the files of its tensors, and operators that this ONNX Runtime may not have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ..runtime.errors import BundleError, NotFoundError, UnsupportedModelError, shown
from ..runtime.model.bundle import MANIFEST

_MAX_BYTES = 2**31  # of a protobuf message
# Domains of operators that ONNX Runtime has without libraries of others.
_DOMAINS = {
    *("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "com.microsoft", "com.microsoft.experimental"),
    *("com.microsoft.nchwc", "com.ms.internal.nhwc"),
}


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph in a file, without the tensors in others. Raises `BundleError` for a file that is no ONNX graph."""
    if path.stat().st_size >= _MAX_BYTES:
        raise BundleError(f"'{path}' has {path.stat().st_size} bytes, an ONNX graph has less than {_MAX_BYTES}")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise BundleError(f"'{path}' is no ONNX graph ({error}); export it again") from error
    if not model.graph.node:
        raise BundleError(f"'{path}' is no ONNX graph (it has no operators); export it again")
    return model


def data_files(path: Path, reserved: Iterable[str]) -> tuple[str, ...]:
    """Names of the files, beside the graph, that hold tensors of it.

    Raises `BundleError` for a file that is no ONNX graph or whose tensors are not in their file, `NotFoundError` for a file
    that is missing, `UnsupportedModelError` for a file elsewhere or under one of the names `reserved`, operators that need a
    library, and training information.
    """
    model = read_graph(path)
    if model.training_info:
        raise UnsupportedModelError(f"'{path}' holds training information; export the graph for inference")
    own = {function.domain for function in model.functions}
    nodes = [*_nodes(model.graph.node)] + [node for f in model.functions for node in _nodes(f.node)]
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in _DOMAINS | own})
    if foreign:
        raise UnsupportedModelError(
            f"'{path}' has operators that need a library of their own: {shown(foreign)}; export it without them"
        )
    taken = {MANIFEST, path.name, *reserved}
    files: dict[str, None] = {}
    for tensor in _tensors(model.graph, nodes):
        if is_external(tensor):
            name = place_of(tensor, path)[0].name
            if name in taken:
                raise UnsupportedModelError(
                    f"the tensor {shown(tensor.name)} of '{path}' is in '{name}', a file of another use"
                )
            files[name] = None
    return tuple(sorted(files))


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """With those of graphs within them."""
    for node in nodes:
        yield node
        for graph in _graphs(node):
            yield from _nodes(graph.node)


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _tensors(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Of the graph, and of those within `nodes`."""
    nodes = [*nodes]
    for one in (graph, *(inner for node in nodes for inner in _graphs(node))):
        yield from one.initializer
        for sparse in one.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether its bytes are in a file of their own."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data)


def place_of(tensor: onnx.TensorProto, graph: Path) -> tuple[Path, int, int | None]:
    """The file of an external tensor, its offset and its length in bytes (None: the rest of the file). Raises as `data_files`
    does."""
    where: dict[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    name = where.get("location", "")
    if not name or Path(name).name != name or "\\" in name or "\0" in name or name.startswith("."):
        raise UnsupportedModelError(
            f"the tensor {shown(tensor.name)} of '{graph}' is in {shown(name)}; a graph's data are in files beside it, named "
            "without a folder: save the graph again (onnx.save with save_as_external_data)"
        )
    file = graph.parent / name
    if not file.is_file():
        raise NotFoundError(f"'{file}' does not exist, and '{graph}' has tensors in it; copy it there")
    try:
        offset, length = (int(where.get(key) or 0) for key in ("offset", "length"))
    except ValueError:
        raise BundleError(
            f"the place of the tensor {shown(tensor.name)} of '{graph}' is no number; export it again"
        ) from None
    size = file.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        raise BundleError(
            f"'{file}' is torn: the tensor {shown(tensor.name)} would be bytes {offset} to {offset + length} of {size}; copy it "
            "again"
        )
    return file, offset, length or None
