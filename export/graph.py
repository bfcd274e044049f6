"""ONNX graphs written from `DecoderConfig`: any slice of the decoder can be a graph.

A `Slice` selects the parts: the embedding, a range of layers, the final norm, the head. In a bundle, the trunk has
the embedding and the layers below the split, a tail has a member's layers and the final norm, the head has the head
alone. A `standard` graph of the whole decoder has the inputs and outputs that other runtimes expect.

Inputs of a slice with layers (B sequences, S positions each, C the length of the bound key/value buffers):

    input_ids      [B, S] int64   or   hidden_states [B, S, hidden] float32
    position_ids   [B, S] int64                  (learned positions only)
    seqlens_k      [B] int32                     positions in the cache after this run, minus 1
    total_sequence_length [] int32               the largest number of positions
    past_key_values.{i}.key/value [B, kv_heads, C, head_size] float32

Outputs: hidden_states [B, S, hidden] (normed if the slice has the norm), present.{i}.key/value, which may be bound to
the buffers of past_key_values.{i}. The head: hidden_states [R, hidden] → logits [R, vocab].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from ..runtime.errors import UnsupportedModelError
from ..runtime.model.config import DecoderConfig
from ..runtime.model.layout import EMBEDDING, POSITIONS, Layer, Linear, Norm
from ..runtime.model.stored import StoredTensor, StoredWeight
from .graph_layers import DecoderWriter
from .graph_nodes import MICROSOFT, Place, Shape

HIDDEN = "hidden_states"
_OPSET = 21
_STEP = 16  # of GroupQueryAttention: sizes are multiples of it


def check_graphs(config: DecoderConfig) -> None:
    """Raises `UnsupportedModelError` for what the operators of ONNX Runtime do not compute."""
    sizes = {"the heads have {} elements": config.head_size, "{} channels of a head rotate": config.rotary_size or 0}
    for what, size in sizes.items():
        if size % _STEP:
            raise UnsupportedModelError(
                f"{what.format(size)}, and the graphs compute multiples of {_STEP}; leave the graphs out (--no-graphs) and "
                "serve with another backend"
            )
    if config.num_experts:
        raise UnsupportedModelError(
            "the graphs have no experts; leave them out (--no-graphs) and serve with the cpu or torch backend"
        )


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a decoder: [embedding] + layers [start, stop) + [norm] + [head]."""

    embedding: bool
    start: int
    stop: int
    norm: bool
    head: bool


class GraphWriter(DecoderWriter):
    """Writes slices of one decoder, in operators of ONNX Runtime that do much in one."""

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, StoredTensor],
        place: Callable[[StoredTensor], Place],
        member: str | None = None,
    ) -> None:
        """Raises what `check_graphs` raises."""
        check_graphs(config)
        super().__init__(config, tensors, place, member)

    def write(self, part: Slice, path: Path, *, standard: bool = False) -> None:
        """Write the graph of `part` to `path`, in the weights file's directory. `standard`: with the interface that
        other runtimes expect (input attention_mask, output logits of the last position)."""
        self._begin()
        hidden = self._embed() if part.embedding else self._input(HIDDEN, TensorProto.FLOAT, self._hidden_shape(part))
        if part.stop > part.start:
            self._lengths(standard)
        # The residual branch that is not added yet: a skip-norm adds and normalises in one node. A tail begins with a
        # branch of zeros, so it uses the same kernel as a graph of the whole decoder and has the same bits.
        pending = None if part.embedding or part.head else self._node("Sub", [hidden, hidden])
        for index in range(part.start, part.stop):
            hidden, pending = self._layer(index, self.layout.layers[index], hidden, pending)
        if part.norm:
            hidden, _ = self._norm(self.layout.norm, hidden, pending, residual=False)
        elif pending is not None:
            hidden = self._node("Add", [hidden, pending])
        if part.head:
            self._head(hidden, last_position=standard)
        else:
            self._output(hidden, HIDDEN, TensorProto.FLOAT, self._hidden_shape(part))
        self._save(path, _OPSET, microsoft=True)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _hidden_shape(self, part: Slice) -> Shape:
        layers = part.embedding or part.stop > part.start or part.norm
        return ["batch", "sequence", self.config.hidden_size] if layers else ["rows", self.config.hidden_size]

    def _embed(self) -> str:
        ids = self._input("input_ids", TensorProto.INT64, ["batch", "sequence"])
        hidden = self._scaled(self._rows(self._find_weight(EMBEDDING), ids), self.config.embedding_scale)
        if self.config.positions == "learned":
            positions = self._input("position_ids", TensorProto.INT64, ["batch", "sequence"])
            embedded = self._node("Gather", [self._tensor(POSITIONS), positions])
            hidden = self._node("Add", [hidden, embedded])
        return hidden

    def _lengths(self, standard: bool) -> None:
        if not standard:
            self._input("seqlens_k", TensorProto.INT32, ["batch"])
            self._input("total_sequence_length", TensorProto.INT32, [])
            return
        mask = self._input("attention_mask", TensorProto.INT64, ["batch", "total_sequence"])
        counts = self._node("ReduceSum", [mask, self._ints(1)], keepdims=0)
        last = self._node("Sub", [counts, self._ints(1)])
        self._node("Cast", [last], output="seqlens_k", to=TensorProto.INT32)
        length = self._node("Gather", [self._node("Shape", [mask]), self._constant("index_1", np.array(1, np.int64))])
        self._node("Cast", [length], output="total_sequence_length", to=TensorProto.INT32)

    def _norm(self, norm: Norm, hidden: str, pending: str | None, *, residual: bool = True) -> tuple[str, str]:
        """A pending branch is added in the same node."""
        rms = norm.kind == "rms"
        weights = [self._tensor(name) for name in norm.tensors]
        epsilon: dict[str, Any] = {"epsilon": self.config.norm_eps}
        if pending is None:
            operator = "SimplifiedLayerNormalization" if rms else "LayerNormalization"
            return self._node(operator, [hidden, *weights], axis=-1, **epsilon), hidden
        operator = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
        normed, total = self._name(operator), self._name("residual")
        outputs = [normed, "", "", total] if residual else [normed]
        self._nodes.append(
            helper.make_node(operator, [hidden, pending, *weights], outputs, name=normed, domain=MICROSOFT, **epsilon)
        )
        return normed, total

    def _attention(self, index: int, layer: Layer, normed: str) -> str:
        config = self.config
        qkv = self._linear(layer.qkv, normed)  # [B, S, q_size + 2 * kv_size]
        query, key, value = (
            (qkv, "", "") if layer.head_norms is None else self._split_and_norm_heads(layer.qkv, layer.head_norms, qkv)
        )
        cache: Shape = ["batch", config.num_kv_heads, "cache", config.head_size]
        past = [self._input(f"past_key_values.{index}.{kind}", TensorProto.FLOAT, cache) for kind in ("key", "value")]
        present = [f"present.{index}.{kind}" for kind in ("key", "value")]
        for name in present:
            self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, cache))
        tables = [self._stored(name) for name in layer.rotary or ()]
        options: dict[str, Any] = {} if layer.window is None else {"local_window_size": layer.window}
        if config.attention_softcap is not None:
            options["softcap"] = config.attention_softcap
        output = self._name("attention")
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [query, key, value, *past, "seqlens_k", "total_sequence_length", *tables],
                [output, *present],
                name=output,
                domain=MICROSOFT,
                num_heads=config.num_heads,
                kv_num_heads=config.num_kv_heads,
                scale=config.attention_scale or config.head_size**-0.5,
                do_rotary=int(layer.rotary is not None),
                rotary_interleaved=0,
                **options,
            )
        )
        return self._linear(layer.out, output)

    def _split_and_norm_heads(self, linear: Linear, norms: tuple[Norm, Norm], qkv: str) -> tuple[str, str, str]:
        """qk-norm: an RMS norm over each head of q and of k, or over all of them, before rotary."""
        sizes = [part.rows for part in linear.parts]
        query, key, value = self._split(qkv, sizes)
        normed = []
        for tensor, size, norm in zip((query, key), sizes, norms):
            tensor = self._reshaped(tensor, 0, 0, size // norm.size, norm.size)
            weights = [self._tensor(own) for own in norm.tensors]
            epsilon = self.config.norm_eps
            tensor = self._node("SimplifiedLayerNormalization", [tensor, *weights], axis=-1, epsilon=epsilon)
            normed.append(self._reshaped(tensor, 0, 0, size))
        return normed[0], normed[1], value

    def _mlp(self, layer: Layer, normed: str) -> str:
        if layer.mlp.up.epilogue in ("gelu", "gelu_erf"):
            kind = "tanh" if layer.mlp.up.epilogue == "gelu" else "none"
            inner = self._node("Gelu", [self._linear(layer.mlp.up, normed)], approximate=kind)
        else:
            gate, up = self._split(self._linear(layer.mlp.up, normed), [part.rows for part in layer.mlp.up.parts])
            if layer.mlp.up.epilogue == "geglu":
                activated = self._node("Gelu", [gate], approximate="tanh")
            else:
                activated = self._node("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)  # x · sigmoid(x)
            inner = self._node("Mul", [activated, up])
        return self._linear(layer.mlp.down, inner)

    def _head(self, hidden: str, *, last_position: bool) -> None:
        """Add the head: logits [R, vocab] of every row, or [B, 1, vocab] of the last position."""
        weight = self._find_weight(self.layout.head)
        shape: Shape = ["rows", self.config.vocab_size]
        if last_position:
            hidden = self._node("Gather", [hidden, self._ints(-1)], axis=1)
            shape = ["batch", 1, self.config.vocab_size]
        logits = self._scaled(self._matmul(weight, hidden), self.config.logit_scale)
        self._output(self._capped(logits, self.config.logit_softcap), "logits", TensorProto.FLOAT, shape)

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
        grouped = self._reshaped(hidden, -1, weight.groups, weight.group_size)
        sums = self._node("ReduceSum", [grouped, self._ints(-1)], keepdims=0)  # [rows, groups]
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
        offsets = self._node("Unsqueeze", [self._node("Gather", [self._offsets(weight), ids]), self._ints(-1)])
        whole = self._node("Add", [self._reshaped(rows, 0, 0, weight.groups, weight.group_size), offsets])
        return self._reshaped(whole, 0, 0, weight.columns)

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

    def _low_rank(self, halves: list[str], hidden: str) -> str:
        for half in halves:
            hidden = self._node("FusedMatMul", [hidden, self._stored(half)], domain=MICROSOFT, transB=1)
        return hidden
