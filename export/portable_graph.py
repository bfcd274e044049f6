"""`PortableWriter`: a whole decoder as an ONNX graph of standard operators alone, which any ONNX runtime loads.

The inputs and outputs are those of Optimum's decoders (B sequences of S new positions after P that are in the cache):

    input_ids, position_ids                  [B, S] int64
    attention_mask                           [B, P + S] int64: 0 for padding, which may be on the left
    past_key_values.{i}.key and .value       [B, kv_heads, P, head_size] float32; P may be 0
    logits                                   [B, S, vocab] float32
    present.{i}.key and .value               [B, kv_heads, P + S, head_size] float32

A row attends to the positions up to its own that are not padding; windows count positions of the cache. Rows of padding are
computed like others, from finite numbers, and nothing reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from ..runtime.errors import UnsupportedModelError
from ..runtime.model.config import DecoderConfig
from ..runtime.model.layout import EMBEDDING, POSITIONS, Layer, Norm
from .graph_nodes import Shape
from .portable_products import PortableProducts

OPSETS = range(17, 24)  # LayerNormalization came with 17; all operators are in 23 as they are here

_BATCH, _NEW, _PAST = "batch_size", "sequence_length", "past_sequence_length"
_ALL = f"{_PAST} + {_NEW}"
_HIDDEN_SCORE = float(np.finfo(np.float32).min)  # finite: the softmax of a row that sees nothing is no NaN
_SWIGLU, _GEGLU, _GELU = "swiglu", "geglu", "gelu"


def check_portable(config: DecoderConfig) -> None:
    """Raises `UnsupportedModelError` for what the graph does not compute."""
    if config.num_experts:
        raise UnsupportedModelError(
            f"the model has {config.num_experts} experts, and ONNX graphs have none; serve the bundle with the cpu or torch "
            "backend"
        )


class PortableWriter(PortableProducts):
    """Writes one decoder (see the module). `check_portable` says which can be written."""

    def write(self, path: Path) -> None:
        """Write the graph to `path`, beside the data file."""
        self._begin()
        self._made_once: dict[str, str] = {}
        ids = self._input("input_ids", TensorProto.INT64, [_BATCH, _NEW])
        self._input("attention_mask", TensorProto.INT64, [_BATCH, _ALL])
        positions = self._input("position_ids", TensorProto.INT64, [_BATCH, _NEW])
        hidden = self._scaled(self._rows(self._find_weight(EMBEDDING), ids), self.config.embedding_scale)
        if self.config.positions == "learned":
            hidden = self._node("Add", [hidden, self._node("Gather", [self._tensor(POSITIONS), positions])])
        pending = None
        for index, layer in enumerate(self.layout.layers):
            hidden, pending = self._layer(index, layer, hidden, pending)
        hidden, _ = self._norm(self.layout.norm, hidden, pending, residual=False)
        logits = self._scaled(self._matmul(self._find_weight(self.layout.head), hidden), self.config.logit_scale)
        logits = self._capped(logits, self.config.logit_softcap)
        self._output(logits, "logits", TensorProto.FLOAT, [_BATCH, _NEW, self.config.vocab_size])
        self._save(path, self.opset)

    # ---- norms and MLP -----------------------------------------------------------------------------------------

    def _norm(self, norm: Norm, hidden: str, pending: str | None, *, residual: bool = True) -> tuple[str, str]:
        total = hidden if pending is None else self._node("Add", [hidden, pending])
        weights = [self._tensor(name) for name in norm.tensors]
        if norm.kind == "layer":
            epsilon = self.config.norm_eps
            return self._node("LayerNormalization", [total, *weights], axis=-1, epsilon=epsilon), total
        # In the operators and the order in which runtimes know an RMS norm.
        square = self._node("Pow", [total, self._real(2.0)])
        if self.opset < 18:
            mean = self._node("ReduceMean", [square], axes=[-1])
        else:
            mean = self._node("ReduceMean", [square, self._ints(-1)])
        root = self._node("Sqrt", [self._node("Add", [mean, self._real(self.config.norm_eps)])])
        return self._node("Mul", [self._node("Div", [total, root]), *weights]), total

    def _mlp(self, layer: Layer, normed: str) -> str:
        product, kind = self._linear(layer.mlp.up, normed), layer.mlp.up.epilogue
        if kind in (_SWIGLU, _GEGLU):
            gate, up = self._split(product, [part.rows for part in layer.mlp.up.parts])
            activated = self._gelu_tanh(gate) if kind == _GEGLU else self._silu(gate)
            return self._linear(layer.mlp.down, self._node("Mul", [activated, up]))
        return self._linear(layer.mlp.down, self._gelu_tanh(product) if kind == _GELU else self._gelu_exact(product))

    def _silu(self, x: str) -> str:
        return self._node("Mul", [x, self._node("Sigmoid", [x])])

    def _gelu_tanh(self, x: str) -> str:
        """x / 2 · (1 + tanh(√(2 / π) · (x + 0.044715 x³)))."""
        cubic = self._scaled(self._node("Pow", [x, self._real(3.0)]), 0.044715)
        bent = self._node("Tanh", [self._scaled(self._node("Add", [x, cubic]), (2 / np.pi) ** 0.5)])
        return self._node("Mul", [self._scaled(x, 0.5), self._node("Add", [bent, self._real(1.0)])])

    def _gelu_exact(self, x: str) -> str:
        """x / 2 · (1 + erf(x / √2))."""
        bent = self._node("Erf", [self._node("Div", [x, self._real(2**0.5)])])
        return self._scaled(self._node("Mul", [x, self._node("Add", [bent, self._real(1.0)])]), 0.5)

    # ---- attention ---------------------------------------------------------------------------------------------

    def _attention(self, index: int, layer: Layer, normed: str) -> str:
        """Query heads that share a key and value head are a dimension of their own, so these are not repeated."""
        config = self.config
        kv_heads, shared, size = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_size
        projected = self._split(self._linear(layer.qkv, normed), [part.rows for part in layer.qkv.parts])
        query, key, value = (
            self._heads(tensor, layer.head_norms[place] if layer.head_norms and place < 2 else None, part.rows)
            for place, (tensor, part) in enumerate(zip(projected, layer.qkv.parts, strict=True))
        )
        if layer.rotary is not None:
            query, key = self._rotated(query, layer.rotary), self._rotated(key, layer.rotary)
        query = self._scaled(query, config.attention_scale or size**-0.5)
        query = self._node("Transpose", [self._reshaped(query, 0, 0, kv_heads, shared, size)], perm=[0, 2, 3, 1, 4])
        present = [
            self._present(f"{index}.{kind}", self._node("Transpose", [new], perm=[0, 2, 1, 3]))
            for kind, new in (("key", key), ("value", value))
        ]
        keys = self._node("Transpose", [present[0]], perm=[0, 1, 3, 2])
        keys, values = (self._node("Unsqueeze", [tensor, self._ints(2)]) for tensor in (keys, present[1]))
        scores = self._capped(self._node("MatMul", [query, keys]), config.attention_softcap)
        scores = self._node("Add", [scores, self._bias(layer.window)])  # [B, kv heads, shared, S, P + S]
        attended = self._node("MatMul", [self._node("Softmax", [scores], axis=-1), values])
        attended = self._node("Transpose", [attended], perm=[0, 3, 1, 2, 4])
        return self._linear(layer.out, self._reshaped(attended, 0, 0, config.q_size))

    def _heads(self, tensor: str, norm: Norm | None, size: int) -> str:
        """[B, S, size] → [B, S, heads, head size], normed over each head or over all of them."""
        if norm is not None:
            tensor = self._norm(norm, self._reshaped(tensor, 0, 0, size // norm.size, norm.size), None)[0]
        return self._reshaped(tensor, 0, 0, size // self.config.head_size, self.config.head_size)

    def _rotated(self, heads: str, tables: tuple[str, str]) -> str:
        """The first channels of each head [B, S, heads, head size] rotate, i paired with i + half of them."""
        cos, sin = (self._once(name, lambda name=name: self._angles(name)) for name in tables)  # type: ignore[misc]
        half = (self.config.rotary_size or self.config.head_size) // 2
        rest = self.config.head_size - 2 * half
        first, second, *others = self._split(heads, [half, half, *([rest] if rest else [])])
        turned = [
            self._node(last, [self._node("Mul", [one, cos]), self._node("Mul", [other, sin])])
            for one, other, last in ((first, second, "Sub"), (second, first, "Add"))
        ]
        return self._node("Concat", [*turned, *others], axis=-1)

    def _angles(self, table: str) -> str:
        """Cosines or sines of the rows' positions, [B, S, 1, half]."""
        rows = self._node("Gather", [self._stored(table), "position_ids"])
        return self._node("Unsqueeze", [rows, self._ints(2)])

    def _present(self, name: str, new: str) -> str:
        shape: Shape = [_BATCH, self.config.num_kv_heads, _PAST, self.config.head_size]
        past = self._input(f"past_key_values.{name}", TensorProto.FLOAT, shape)
        present = self._node("Concat", [past, new], axis=2, output=f"present.{name}")
        shape = [_BATCH, self.config.num_kv_heads, _ALL, self.config.head_size]
        self._outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, shape))
        return present

    def _bias(self, window: int | None) -> str:
        """What is added to the scores, [B, 1, 1, S, P + S]: 0 where a row attends to a position."""
        return self._once(f"bias of {window}", lambda: self._make_bias(window))

    def _make_bias(self, window: int | None) -> str:
        keys, rows = self._once("keys", lambda: self._range("zero", "all")), self._once("rows", self._row_indices)
        visible = self._node("LessOrEqual", [keys, rows])
        if window is not None:
            first = self._node("Sub", [rows, self._ints(window)])
            visible = self._node("And", [visible, self._node("Greater", [keys, first])])
        mask = self._once("mask", self._padding)
        shown = self._node("And", [visible, mask])  # [B, S, P + S]
        bias = self._node("Where", [shown, self._real(0.0), self._real(_HIDDEN_SCORE)])
        return self._node("Unsqueeze", [bias, self._ints(1, 2)])

    def _padding(self) -> str:
        """Which positions are none of padding, [B, 1, P + S]."""
        real = self._node("Cast", ["attention_mask"], to=TensorProto.BOOL)
        return self._node("Unsqueeze", [real, self._ints(1)])

    def _row_indices(self) -> str:
        """Places of the rows in the cache, [S, 1]."""
        return self._node("Unsqueeze", [self._range("past", "all"), self._ints(1)])

    def _range(self, first: str, last: str) -> str:
        """Places in the cache from one count of positions to another: "zero", "past", "all"."""
        return self._node(
            "Range", [self._count(first), self._count(last), self._constant("one", np.array(1, np.int64))]
        )

    def _count(self, what: str) -> str:
        if what == "zero":
            return self._constant("zero", np.array(0, np.int64))
        if what == "past":
            counts = [self._count("all"), self._once("new", lambda: self._size("input_ids"))]
            return self._once("past", lambda: self._node("Sub", counts))
        return self._once("all", lambda: self._size("attention_mask"))

    def _size(self, tensor: str) -> str:
        """The number of columns, a scalar."""
        return self._node("Gather", [self._node("Shape", [tensor]), self._constant("one", np.array(1, np.int64))])

    def _once(self, key: str, make: Callable[[], str]) -> str:
        """What `make` writes, the first time that it is asked for in a graph."""
        if key not in self._made_once:
            self._made_once[key] = make()
        return self._made_once[key]
