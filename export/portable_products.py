"""Products with a bundle's weights in ONNX's standard operators. Activations are float32.

A weight [N, K] is written transposed, [K, N], so that MatMul takes it as it is. A head that is tied to the embedding is one
tensor with it, whose columns are the embedding's rows, unless it is quantised in blocks.

    32 bits       MatMul
    8 bits        w = value · scale: DequantizeLinear in blocks, which runtimes fuse with MatMul
    4 bits        w = value · scale + offset. The offset is a real number, which DequantizeLinear does not have: the sums of the
                  groups' activations are multiplied with the offsets, and added
    opset < 21    DequantizeLinear has no blocks: Cast, Mul, Add and MatMul
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from ..runtime.errors import UnsupportedModelError
from ..runtime.model.config import DecoderConfig
from ..runtime.model.stored import StoredTensor, StoredWeight, unpack_nibbles
from .data_file import DataFile
from .flavours import WeightForm
from .graph_layers import DecoderWriter
from .quantisation.groups import Quantised, dequantise, pack_nibbles

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

_BLOCKS = 21  # the opset from which DequantizeLinear has blocks
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
_TYPES |= {"uint8": TensorProto.UINT8}
_FLOATS = ("F32", "F16")  # types that floats are stored in


class PortableProducts(DecoderWriter, ABC):
    """`opset`: of the graph. `form`: of linear layers, embedding and head; norms, biases, adapters and tables of positions keep
    their type."""

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, StoredTensor],
        data: DataFile,
        member: str,
        opset: int,
        form: WeightForm,
    ) -> None:
        super().__init__(config, tensors, data.copy, member)
        self.data, self.opset, self.form = data, opset, form

    def _matmul(self, weight: StoredWeight, hidden: str) -> str:
        if not self._is_quantised(weight):
            return self._node("MatMul", [hidden, self._widened(self._turned(weight))])
        if self.opset < _BLOCKS:
            return self._node("MatMul", [hidden, self._spread(weight)])
        values = self._four_bits(weight) if weight.bits == 4 else self._turned(weight)
        whole = self._node("DequantizeLinear", [values, self._scales(weight)], axis=0, block_size=weight.group_size)
        product = self._node("MatMul", [hidden, whole])
        if weight.bits == 8:
            return product
        grouped = self._reshaped(hidden, 0, 0, weight.groups, weight.group_size)
        sums = self._node("ReduceSum", [grouped, self._ints(-1)], keepdims=0)
        return self._node("Add", [product, self._node("MatMul", [sums, self._minima(weight, 8)])])

    def _low_rank(self, halves: list[str], hidden: str) -> str:
        for half in halves:
            turned = self._made(f"{half}.turned", lambda half=half: self.data.read(self._found(half, _FLOATS)).T)  # type: ignore[misc]
            hidden = self._node("MatMul", [hidden, turned])
        return hidden

    def _rows(self, weight: StoredWeight, ids: str) -> str:
        """Rows of an embedding, ids [B, S] → [B, S, columns]."""
        if not self._is_quantised(weight):
            return self._widened(self._gathered(weight, weight.name, self._plain, ids))
        scales = self._gathered(weight, weight.scales, self._read_scales, ids)
        scales = self._node("Unsqueeze", [scales, self._ints(-1)])  # [B, S, groups, 1]
        if weight.minima is None:
            values = self._cast(self._gathered(weight, weight.name, self._signed, ids))
            values = self._reshaped(values, 0, 0, weight.groups, weight.group_size)
            return self._reshaped(self._node("Mul", [values, scales]), 0, 0, weight.columns)
        packed = self._node("Gather", [self._stored(weight.values), ids])  # [B, S, groups, bytes]
        halves = [self._node("Unsqueeze", [half, self._ints(-1)]) for half in self._nibbles(packed)]
        values = self._reshaped(self._node("Concat", halves, axis=-1), 0, 0, weight.groups, weight.group_size)
        minima = self._gathered(weight, weight.minima, self._read_minima, ids)
        minima = self._node("Unsqueeze", [minima, self._ints(-1)])
        whole = self._node("Add", [self._node("Mul", [values, scales]), minima])
        return self._reshaped(whole, 0, 0, weight.columns)

    def _gathered(self, weight: StoredWeight, name: str, read: Callable[[StoredWeight], Array], ids: str) -> str:
        """[B, S, n] of what a weight's rows have, which `read` gives as [rows, n]. If they are the head's too, it is the tensor
        `name` [n, rows] that the head has; but a tensor with other readers would not be fused with its MatMul."""
        is_fused = self._is_quantised(weight) and self.opset >= _BLOCKS
        if weight == self._find_weight(self.layout.head) and not is_fused:
            columns = self._node("Gather", [self._made(name, lambda: read(weight).T), ids], axis=1)
            return self._node("Transpose", [columns], perm=[1, 2, 0])
        return self._node("Gather", [self._made(f"{name}.rows", lambda: read(weight)), ids])

    def _spread(self, weight: StoredWeight) -> str:
        """A quantised weight as float32 [columns, rows]."""
        scales = self._node("Unsqueeze", [self._scales(weight), self._ints(1)])  # [groups, 1, rows]
        if weight.bits == 8:
            values = self._reshaped(self._cast(self._turned(weight)), weight.groups, weight.group_size, weight.rows)
            return self._reshaped(self._node("Mul", [values, scales]), weight.columns, weight.rows)
        packed = self._made(f"{weight.name}.halves", lambda: self._halves(weight))  # [groups, group size / 2, rows]
        values = self._node("Concat", self._nibbles(packed), axis=1)  # [groups, group size, rows]
        minima = self._node("Unsqueeze", [self._minima(weight, 0), self._ints(1)])
        whole = self._node("Add", [self._node("Mul", [values, scales]), minima])
        return self._reshaped(whole, weight.columns, weight.rows)

    def _nibbles(self, packed: str) -> list[str]:
        """Low and high values of each byte, in float32."""
        whole = self._cast(packed)
        high = self._node("Floor", [self._scaled(whole, 1 / 16)])
        return [self._node("Sub", [whole, self._scaled(high, 16.0)]), high]

    def _widened(self, tensor: str) -> str:
        """Values of `_plain` in float32."""
        return self._cast(tensor) if self.form is WeightForm.FLOAT16 else tensor

    def _cast(self, tensor: str) -> str:
        return self._node("Cast", [tensor], to=TensorProto.FLOAT)

    # ---- initializers ------------------------------------------------------------------------------------------

    def _is_quantised(self, weight: StoredWeight) -> bool:
        return weight.bits != 32 and self.form is WeightForm.STORED

    def _turned(self, weight: StoredWeight) -> str:
        """[columns, rows]: floats, or signed values of 8 bits."""
        read = self._signed if self._is_quantised(weight) else self._plain
        return self._made(weight.name, lambda: read(weight).T)

    def _scales(self, weight: StoredWeight) -> str:
        """[groups, rows] float32."""
        return self._made(weight.scales, lambda: self._read_scales(weight).T)

    def _minima(self, weight: StoredWeight, middle: int) -> str:
        """[groups, rows] float32: what is added to (value - middle) · scale."""
        kind = "offsets" if middle else "minima"
        return self._made(
            f"{weight.name}.{kind}", lambda: (self._read_minima(weight) + middle * self._read_scales(weight)).T
        )

    def _four_bits(self, weight: StoredWeight) -> str:
        """[columns, rows] int4 of a 4-bit weight, less 8; two in a byte, the first one in its low half."""
        name, shape = f"{weight.name}.int4", (weight.columns, weight.rows)
        if name not in self._initializers:
            values: Array = np.ascontiguousarray(self._nibble_values(weight).T ^ 8)  # two's complement
            self._external(name, TensorProto.INT4, shape, self.data.add(pack_nibbles(values.reshape(-1))))
        return name

    def _made(self, name: str, make: Callable[[], Array]) -> str:
        """An initializer whose values are computed, the first time."""
        if name not in self._initializers:
            values = make()
            self._external(name, _TYPES[values.dtype.name], values.shape, self.data.add(values))
        return name

    # ---- values ------------------------------------------------------------------------------------------------

    def _read_values(self, weight: StoredWeight) -> Array:
        """[rows, groups, bytes]."""
        return self.data.read(self._found(weight.values, ("U8",)))

    def _plain(self, weight: StoredWeight) -> Array:
        """[rows, columns] in float32 or float16. Raises `UnsupportedModelError` for what float16 cannot hold."""
        if weight.bits == 32:
            values: Array = self.data.read(self._found(weight.name, _FLOATS))
        else:
            minima = None if weight.minima is None else self._read_minima(weight)
            values = dequantise(Quantised(weight.bits, self._read_values(weight), self._read_scales(weight), minima))
        if self.form is not WeightForm.FLOAT16:
            return values.astype(np.float32, copy=False)
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise UnsupportedModelError(
                f"'{weight.name}' has the value {np.abs(values).max():.3g}, float16 has at most {np.finfo(np.float16).max:.0f}; "
                "write float32"
            )
        return rounded

    def _signed(self, weight: StoredWeight) -> Array:
        """[rows, columns] int8 of an 8-bit weight."""
        return (self._read_values(weight) ^ 0x80).view(np.int8).reshape(weight.rows, weight.columns)

    def _nibble_values(self, weight: StoredWeight) -> Array:
        """[rows, columns] of a 4-bit weight, 0…15."""
        return unpack_nibbles(self._read_values(weight)).reshape(weight.rows, weight.columns)

    def _halves(self, weight: StoredWeight) -> Array:
        """[groups, group size / 2, rows]: the first half of each group in the low nibbles, the second in the high ones."""
        values = self._nibble_values(weight).T.reshape(weight.groups, 2, weight.group_size // 2, weight.rows)
        return np.asarray(values[:, 0] | values[:, 1] << 4)

    def _read_scales(self, weight: StoredWeight) -> F32:
        return self._read_groups(weight, weight.scales)

    def _read_minima(self, weight: StoredWeight) -> F32:
        assert weight.minima is not None
        return self._read_groups(weight, weight.minima)

    def _read_groups(self, weight: StoredWeight, name: str) -> F32:
        """[rows, groups]."""
        return self.data.read(self._found(name, _FLOATS, (weight.rows, weight.groups))).astype(np.float32)
