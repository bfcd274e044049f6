"""The nodes and tensors that ONNX graphs are made of, and products with stored weights.

Initializers are ONNX external data: name, offset and length *into* the bundle's `model.safetensors`, so all graphs and
all backends share one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..runtime.model.stored import StoredTensor, StoredWeight, resolve, stored_weight

MICROSOFT = "com.microsoft"
_DTYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "U8": TensorProto.UINT8}


class NodeWriter:
    """Collects the nodes of one graph after the other. `tensors`: of the weights file, read as `member` has them; None: as the
    base has them."""

    def __init__(self, tensors: Mapping[str, StoredTensor], weights_file: str, member: str | None) -> None:
        self.tensors = tensors
        self.weights_file = weights_file
        self.member = member
        self._begin()

    def _begin(self) -> None:
        """Begin a graph."""
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    # ---- products with stored weights --------------------------------------------------------------------------

    def _matmul(self, weight: StoredWeight, hidden: str) -> str:
        """hidden [..., columns] → [..., rows]. `MatMulNBits` quantises activations to 8 bits per row and group
        (accuracy level 4). Its zero points are whole numbers, so with 4 bits they are left at 8, and the products of
        `_offsets` with the sums of the groups' activations are added."""
        if weight.bits == 32:
            return self._node("FusedMatMul", [hidden, self._stored(weight.name)], domain=MICROSOFT, transB=1)
        product = self._node(
            "MatMulNBits",
            [hidden, self._stored(weight.values), self._floats(weight.scales)],
            domain=MICROSOFT,
            K=weight.columns,
            N=weight.rows,
            bits=weight.bits,
            block_size=weight.group_size,
            accuracy_level=4,
        )
        if weight.minima is None:
            return product
        grouped = np.array([-1, weight.groups, weight.group_size], np.int64)
        shape = self._constant(f"groups_{weight.columns}_{weight.group_size}", grouped)
        last = self._constant("axis_last", np.array([-1], np.int64))
        sums = self._node("ReduceSum", [self._node("Reshape", [hidden, shape]), last], keepdims=0)  # [rows, groups]
        added = self._node("FusedMatMul", [sums, self._offsets(weight)], domain=MICROSOFT, transB=1)
        return self._node("Add", [product, self._node("Reshape", [added, self._node("Shape", [product])])])

    def _rows(self, weight: StoredWeight, ids: str) -> str:
        """Rows of an embedding, [B, S, columns]."""
        if weight.bits == 32:
            return self._node("Gather", [self._stored(weight.name), ids])
        rows = self._node(
            "GatherBlockQuantized",
            [
                self._stored(weight.values, (weight.rows, weight.columns * weight.bits // 8)),
                ids,
                self._floats(weight.scales),
            ],
            domain=MICROSOFT,
            bits=weight.bits,
            block_size=weight.group_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if weight.minima is None:
            return rows
        grouped = self._constant("row_groups", np.array([0, 0, weight.groups, weight.group_size], np.int64))
        last = self._constant("axis_last", np.array([-1], np.int64))
        offsets = self._node("Unsqueeze", [self._node("Gather", [self._offsets(weight), ids]), last])
        whole = self._node("Add", [self._node("Reshape", [rows, grouped]), offsets])
        return self._node("Reshape", [whole, self._constant("row_flat", np.array([0, 0, weight.columns], np.int64))])

    def _offsets(self, weight: StoredWeight) -> str:
        """minimum + 8 · scale of each group of a 4-bit weight, [rows, groups]: w = (value - 8) · scale + offset. Made when
        the graph is loaded."""
        assert weight.minima is not None
        eights = self._scaled(self._floats(weight.scales), 8.0)
        return self._node("Add", [self._floats(weight.minima), eights])

    def _floats(self, name: str) -> str:
        """A stored tensor in float32."""
        stored = self._stored(name)
        return stored if self.tensors[name].dtype == "F32" else self._node("Cast", [stored], to=TensorProto.FLOAT)

    def _scaled(self, tensor: str, factor: float) -> str:
        if factor == 1:
            return tensor
        return self._node("Mul", [tensor, self._constant(f"scale_{factor}", np.array(factor, np.float32))])

    # ---- nodes and tensors -------------------------------------------------------------------------------------

    def _name(self, operator: str) -> str:
        return f"{operator}_{len(self._nodes)}"

    def _node(self, operator: str, inputs: list[str], *, output: str = "", domain: str = "", **attributes: Any) -> str:
        output = output or self._name(operator)
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def _split(self, tensor: str, sizes: list[int]) -> list[str]:
        name = self._name("Split")
        outputs = [f"{name}_{i}" for i in range(len(sizes))]
        split = self._constant("split_" + "_".join(map(str, sizes)), np.array(sizes, np.int64))
        self._nodes.append(helper.make_node("Split", [tensor, split], outputs, name=name, axis=-1))
        return outputs

    def _input(self, name: str, dtype: int, shape: list[str | int]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def _output(self, tensor: str, name: str, dtype: int, shape: list[str | int]) -> None:
        """Name `tensor` as a graph output; outputs come before the key/value pairs."""
        output = name if name not in {value.name for value in self._inputs} else f"{name}_out"
        self._nodes.append(helper.make_node("Identity", [tensor], [output], name=output))
        self._outputs.insert(0, helper.make_tensor_value_info(output, dtype, shape))

    def _constant(self, name: str, value: np.ndarray) -> str:
        self._initializers.setdefault(name, onnx.numpy_helper.from_array(value, name))
        return name

    def _find_weight(self, name: str) -> StoredWeight:
        return stored_weight(self.tensors, resolve(self.tensors, name, self.member))

    def _tensor(self, name: str) -> str:
        return self._stored(resolve(self.tensors, name, self.member))

    def _stored(self, name: str, shape: tuple[int, ...] | None = None) -> str:
        """An initializer that points into the weights file. `shape`: another shape for the same bytes."""
        tensor = self.tensors[name]
        key = name if shape is None else f"{name}:{'x'.join(map(str, shape))}"
        if key not in self._initializers:
            proto = TensorProto(name=key, data_type=_DTYPES[tensor.dtype], dims=shape or tensor.shape)
            proto.data_location = TensorProto.EXTERNAL
            where = {"location": self.weights_file, "offset": tensor.offset, "length": tensor.length}
            for entry, value in where.items():
                proto.external_data.add(key=entry, value=str(value))
            self._initializers[key] = proto
        return key

    def _save(self, path: Path) -> None:
        graph = helper.make_graph(
            self._nodes, path.stem, self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="motet")
        path.write_bytes(model.SerializeToString())
