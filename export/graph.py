"""ONNX graphs written from `DecoderConfig`: any slice of the decoder is one graph.

A `Slice` says which part: the embedding, a run of layers, the final norm, the head. A bundle's trunk is (embedding,
layers below the split), a member's tail (its layers, the final norm), the head (head). One `standard` graph of the whole
decoder has the inputs and outputs that other runtimes expect.

Initializers are ONNX external data: name, offset and length *into* the bundle's `model.safetensors`, so all graphs and
all backends share one copy of the weights.

Inputs of a slice with layers (B sequences, S positions each, C the length of the bound key/value buffers):

    input_ids      [B, S] int64   or   hidden_states [B, S, hidden] float32
    position_ids   [B, S] int64                  (learned positions only)
    seqlens_k      [B] int32                     positions in the cache after this run, less one
    total_sequence_length [] int32               the longest of them (plus one)
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
import onnx
from onnx import TensorProto, helper

from ..runtime.model.config import DecoderConfig

MICROSOFT = "com.microsoft"
HIDDEN = "hidden_states"


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a decoder: [embedding] + layers [start, stop) + [norm] + [head]."""

    embedding: bool
    start: int
    stop: int
    norm: bool
    head: bool


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the weights file: bytes `offset` … `offset + length`."""

    dtype: str  # as safetensors names it: F32, U8
    shape: tuple[int, ...]
    offset: int
    length: int


class GraphWriter:
    """Writes slices of one decoder. `resolve` maps a canonical tensor name to the stored one (a tail has its own)."""

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, StoredTensor],
        weights_file: str,
        resolve: Callable[[str], str] = lambda name: name,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.weights_file = weights_file
        self.resolve = resolve

    def write(self, part: Slice, path: Path, *, standard: bool = False) -> None:
        """Write the graph of `part` to `path`, beside the weights file. `standard`: with the interface that other
        runtimes expect (attention_mask in, last position's logits out)."""
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        hidden = self._embed() if part.embedding else self._input(HIDDEN, TensorProto.FLOAT, self._hidden_shape(part))
        if part.stop > part.start:
            self._lengths(standard)
        # The residual branch that is not added yet: a skip-norm adds and norms in one node. A tail begins with a branch
        # of zeros: so it goes through the same kernel as in a whole graph, and is equal to it bit for bit.
        pending = None if part.embedding or part.head else self._node("Sub", [hidden, hidden])
        for index in range(part.start, part.stop):
            hidden, pending = self._layer(index, hidden, pending)
        if part.norm:
            hidden, _ = self._norm("model.norm", hidden, pending, residual=False)
        elif pending is not None:
            hidden = self._node("Add", [hidden, pending])
        if part.head:
            self._head(hidden, last_position=standard)
        else:
            self._output(hidden, HIDDEN, TensorProto.FLOAT, self._hidden_shape(part))
        self._save(path)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _hidden_shape(self, part: Slice) -> list[str | int]:
        layers = part.embedding or part.stop > part.start or part.norm
        return ["batch", "sequence", self.config.hidden_size] if layers else ["rows", self.config.hidden_size]

    def _embed(self) -> str:
        ids = self._input("input_ids", TensorProto.INT64, ["batch", "sequence"])
        name = self.resolve("model.embed_tokens.weight")
        if f"{name}.values" in self.tensors:
            shape = self.tensors[f"{name}.values"].shape
            values = self._stored(f"{name}.values", shape=(shape[0], shape[1] * shape[2]))
            hidden = self._node(
                "GatherBlockQuantized",
                [values, ids, self._stored(f"{name}.scales")],
                domain=MICROSOFT,
                bits=8,
                block_size=self._group(name),
                gather_axis=0,
                quantize_axis=1,
            )
        else:
            hidden = self._node("Gather", [self._stored(name), ids])
        if self.config.positions == "learned":
            positions = self._input("position_ids", TensorProto.INT64, ["batch", "sequence"])
            embedded = self._node("Gather", [self._weight("model.embed_positions.weight"), positions])
            hidden = self._node("Add", [hidden, embedded])
        return hidden

    def _lengths(self, standard: bool) -> None:
        if not standard:
            self._input("seqlens_k", TensorProto.INT32, ["batch"])
            self._input("total_sequence_length", TensorProto.INT32, [])
            return
        mask = self._input("attention_mask", TensorProto.INT64, ["batch", "total_sequence"])
        counts = self._node("ReduceSum", [mask, self._constant("axis_1", np.array([1], np.int64))], keepdims=0)
        last = self._node("Sub", [counts, self._constant("one", np.array([1], np.int64))])
        self._node("Cast", [last], output="seqlens_k", to=TensorProto.INT32)
        length = self._node("Gather", [self._node("Shape", [mask]), self._constant("index_1", np.array(1, np.int64))])
        self._node("Cast", [length], output="total_sequence_length", to=TensorProto.INT32)

    def _layer(self, index: int, hidden: str, pending: str | None) -> tuple[str, str]:
        prefix = f"model.layers.{index}"
        normed, hidden = self._norm(f"{prefix}.input_layernorm", hidden, pending)
        attention = self._attention(index, normed)
        normed, hidden = self._norm(f"{prefix}.post_attention_layernorm", hidden, attention)
        return hidden, self._mlp(f"{prefix}.mlp", normed)

    def _norm(self, name: str, hidden: str, pending: str | None, *, residual: bool = True) -> tuple[str, str]:
        """(normed, residual stream). With a pending branch: residual = hidden + pending, in the same node."""
        rms = self.config.norm == "rms"
        weights = [self._weight(f"{name}.weight")] + ([] if rms else [self._weight(f"{name}.bias")])
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

    def _attention(self, index: int, normed: str) -> str:
        config, prefix = self.config, f"model.layers.{index}.self_attn"
        qkv = self._linear(f"{prefix}.qkv_proj", normed, config.hidden_size)  # [B, S, q_size + 2 * kv_size]
        query, key, value = (qkv, "", "") if not config.qk_norm else self._split_and_norm_heads(prefix, qkv)
        cache: list[str | int] = ["batch", config.num_kv_heads, "cache", config.head_size]
        past = [self._input(f"past_key_values.{index}.{kind}", TensorProto.FLOAT, cache) for kind in ("key", "value")]
        present = [f"present.{index}.{kind}" for kind in ("key", "value")]
        for name in present:
            self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, cache))
        rotary = config.positions == "rotary"
        tables = [self._stored("rotary.cos"), self._stored("rotary.sin")] if rotary else []
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
                scale=config.head_size**-0.5,
                do_rotary=int(rotary),
                rotary_interleaved=0,
            )
        )
        return self._linear(f"{prefix}.o_proj", output, config.q_size)

    def _split_and_norm_heads(self, prefix: str, qkv: str) -> tuple[str, str, str]:
        """qk-norm: an RMS norm over each head of q and of k, before rotary."""
        config = self.config
        query, key, value = self._split(qkv, [config.q_size, config.kv_size, config.kv_size])
        normed = []
        for name, tensor, size in (("q", query, config.q_size), ("k", key, config.kv_size)):
            heads = self._constant(
                f"{name}_heads", np.array([0, 0, size // config.head_size, config.head_size], np.int64)
            )
            flat = self._constant(f"{name}_flat", np.array([0, 0, size], np.int64))
            tensor = self._node("Reshape", [tensor, heads])
            weight = self._weight(f"{prefix}.{name}_norm.weight")
            tensor = self._node("SimplifiedLayerNormalization", [tensor, weight], axis=-1, epsilon=config.norm_eps)
            normed.append(self._node("Reshape", [tensor, flat]))
        return normed[0], normed[1], value

    def _mlp(self, prefix: str, normed: str) -> str:
        hidden_size, size = self.config.hidden_size, self.config.intermediate_size
        if self.config.activation == "gelu":
            inner = self._node("Gelu", [self._linear(f"{prefix}.up_proj", normed, hidden_size)], approximate="tanh")
        else:
            gate, up = self._split(self._linear(f"{prefix}.gate_up_proj", normed, hidden_size), [size, size])
            silu = self._node("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)  # x · sigmoid(x)
            inner = self._node("Mul", [silu, up])
        return self._linear(f"{prefix}.down_proj", inner, size)

    def _head(self, hidden: str, *, last_position: bool) -> None:
        """Logits of every row, or [B, 1, vocab] of the last position."""
        name = self.resolve("model.embed_tokens.weight" if self.config.tied_head else "lm_head.weight")
        shape: list[str | int] = ["rows", self.config.vocab_size]
        if last_position:
            hidden = self._node("Gather", [hidden, self._constant("last", np.array([-1], np.int64))], axis=1)
            shape = ["batch", 1, self.config.vocab_size]
        if f"{name}.values" in self.tensors:
            logits = self._matmul_quantised(name, hidden, self.config.hidden_size)
        else:
            logits = self._matmul(name, hidden)
        self._output(logits, "logits", TensorProto.FLOAT, shape)

    # ---- linear layers -----------------------------------------------------------------------------------------

    def _linear(self, name: str, hidden: str, columns: int) -> str:
        """hidden [B, S, columns] → [B, S, out features], with the bias if the checkpoint has one."""
        weight, bias = self.resolve(f"{name}.weight"), self.resolve(f"{name}.bias")
        if f"{weight}.values" not in self.tensors:
            output = self._matmul(weight, hidden)
        elif self._bits(weight) == 4:
            output = self._matmul_quantised(weight, *self._with_group_sums(hidden, columns, self._group(weight)))
        else:
            output = self._matmul_quantised(weight, hidden, columns)
        return self._node("Add", [output, self._stored(bias)]) if bias in self.tensors else output

    def _matmul(self, weight: str, hidden: str) -> str:
        return self._node("FusedMatMul", [hidden, self._stored(weight)], domain=MICROSOFT, transB=1)

    def _bits(self, weight: str) -> int:
        return 4 if f"{weight}.zero_points" in self.tensors else 8

    def _group(self, weight: str) -> int:
        return self.tensors[f"{weight}.values"].shape[2] * 8 // self._bits(weight)

    def _matmul_quantised(self, weight: str, hidden: str, columns: int) -> str:
        """`MatMulNBits` with activations quantised per row and group to 8 bits (accuracy level 4)."""
        inputs = [hidden, self._stored(f"{weight}.values"), self._stored(f"{weight}.scales")]
        if f"{weight}.zero_points" in self.tensors:
            inputs.append(self._stored(f"{weight}.zero_points"))
        return self._node(
            "MatMulNBits",
            inputs,
            domain=MICROSOFT,
            K=columns,
            N=self.tensors[f"{weight}.values"].shape[0],
            bits=self._bits(weight),
            block_size=self._group(weight),
            accuracy_level=4,
        )

    def _with_group_sums(self, hidden: str, columns: int, group_size: int) -> tuple[str, int]:
        """The activations with the sum of each group as further columns (see `quantise`), and how many they are."""
        groups = columns // group_size
        shape = self._constant(f"groups_{columns}", np.array([0, 0, groups, group_size], np.int64))
        last = self._constant("axis_last", np.array([-1], np.int64))
        sums = self._node("ReduceSum", [self._node("Reshape", [hidden, shape]), last], keepdims=0)
        return self._node("Concat", [hidden, sums], axis=-1), columns + groups

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

    def _weight(self, name: str) -> str:
        return self._stored(self.resolve(name))

    def _stored(self, name: str, shape: tuple[int, ...] | None = None) -> str:
        """An initializer that points into the weights file; `shape` may view the same bytes differently."""
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


_DTYPES = {"F32": TensorProto.FLOAT, "U8": TensorProto.UINT8}
