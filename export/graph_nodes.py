"""The nodes and tensors that ONNX graphs are made of.

Initializers of stored tensors are ONNX external data: name, offset and length *into* a file beside the graph. A bundle's graphs
point into its `model.safetensors`, so all graphs and all backends share one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..runtime.errors import BundleError, shown
from ..runtime.model.stored import StoredTensor, StoredWeight, resolve, stored_weight

MICROSOFT = "com.microsoft"
_DTYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "U8": TensorProto.UINT8}

Place = tuple[str, int, int]  # of a tensor: the file's name, offset and length in bytes
Shape = list[str | int]  # of an input or output; a name for a size that is not fixed


def in_file(name: str) -> Callable[[StoredTensor], Place]:
    """Tensors stay where they are, in the weights file `name` beside the graph."""
    return lambda tensor: (name, tensor.offset, tensor.length)


class NodeWriter:
    """Collects the nodes of one graph after the other. `tensors`: of the weights file, read as `member` has them; None: as the
    base has them. `place`: the bytes of a stored tensor, as the graph finds them."""

    def __init__(
        self, tensors: Mapping[str, StoredTensor], place: Callable[[StoredTensor], Place], member: str | None
    ) -> None:
        self.tensors = tensors
        self.member = member
        self._place = place
        self._begin()

    def _begin(self) -> None:
        """Begin a graph."""
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    # ---- nodes -------------------------------------------------------------------------------------------------

    def _name(self, operator: str) -> str:
        return f"{operator}_{len(self._nodes)}"

    def _node(self, operator: str, inputs: list[str], *, output: str = "", domain: str = "", **attributes: Any) -> str:
        output = output or self._name(operator)
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def _scaled(self, tensor: str, factor: float) -> str:
        return tensor if factor == 1 else self._node("Mul", [tensor, self._real(factor)])

    def _capped(self, tensor: str, cap: float | None) -> str:
        """cap · tanh(x / cap); None: x."""
        return tensor if cap is None else self._scaled(self._node("Tanh", [self._scaled(tensor, 1 / cap)]), cap)

    def _split(self, tensor: str, sizes: list[int]) -> list[str]:
        """Along the last axis."""
        name = self._name("Split")
        outputs = [f"{name}_{i}" for i in range(len(sizes))]
        self._nodes.append(helper.make_node("Split", [tensor, self._ints(*sizes)], outputs, name=name, axis=-1))
        return outputs

    def _reshaped(self, tensor: str, *shape: int) -> str:
        """0: the size that it has; -1: what is left."""
        return self._node("Reshape", [tensor, self._ints(*shape)])

    # ---- inputs and outputs ------------------------------------------------------------------------------------

    def _input(self, name: str, dtype: int, shape: Shape) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def _output(self, tensor: str, name: str, dtype: int, shape: Shape) -> None:
        """Name `tensor` as a graph output; outputs come before the key/value pairs."""
        output = name if name not in {value.name for value in self._inputs} else f"{name}_out"
        self._nodes.append(helper.make_node("Identity", [tensor], [output], name=output))
        self._outputs.insert(0, helper.make_tensor_value_info(output, dtype, shape))

    # ---- tensors -----------------------------------------------------------------------------------------------

    def _constant(self, name: str, value: np.ndarray) -> str:
        self._initializers.setdefault(name, onnx.numpy_helper.from_array(value, name))
        return name

    def _ints(self, *values: int) -> str:
        """[values] int64."""
        return self._constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def _real(self, value: float) -> str:
        """A scalar in float32."""
        return self._constant(f"real_{value}", np.array(value, np.float32))

    def _find_weight(self, name: str) -> StoredWeight:
        return stored_weight(self.tensors, resolve(self.tensors, name, self.member))

    def _tensor(self, name: str) -> str:
        return self._stored(resolve(self.tensors, name, self.member))

    def _stored(self, name: str, shape: tuple[int, ...] | None = None) -> str:
        """An initializer of a stored tensor. `shape`: another shape for the same bytes."""
        tensor = self._found(name, tuple(_DTYPES))
        key = name if shape is None else f"{name}:{'x'.join(map(str, shape))}"
        if key not in self._initializers:
            self._external(key, _DTYPES[tensor.dtype], shape or tensor.shape, self._place(tensor))
        return key

    def _found(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> StoredTensor:
        """The place of a stored tensor. Raises `BundleError` if there is none of these types and of this shape (None: any)."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise BundleError(f"the bundle has no tensor '{name}'; export it again")
        if tensor.dtype not in dtypes or (shape is not None and tensor.shape != shape):
            expected = " or ".join(dtypes) + (f" {list(shape)}" if shape is not None else "")
            raise BundleError(
                f"the bundle's '{name}' is {tensor.dtype} {shown(list(tensor.shape))}, it must be {expected}; export it again"
            )
        return tensor

    def _external(self, name: str, dtype: int, shape: tuple[int, ...], place: Place) -> None:
        """Add an initializer whose bytes are in a file beside the graph."""
        proto = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in zip(("location", "offset", "length"), place, strict=True):
            proto.external_data.add(key=key, value=str(value))
        self._initializers[name] = proto

    def _save(self, path: Path, opset: int, *, microsoft: bool = False) -> None:
        """Write the graph, in the oldest form of the file that has the opset. `microsoft`: operators of ONNX Runtime are used
        too."""
        graph = helper.make_graph(
            self._nodes, path.stem, self._inputs, self._outputs, list(self._initializers.values())
        )
        standard = helper.make_opsetid("", opset)
        opsets = [standard, *([helper.make_opsetid(MICROSOFT, 1)] if microsoft else [])]
        version = helper.find_min_ir_version_for([standard])
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="motet")
        path.write_bytes(model.SerializeToString())
