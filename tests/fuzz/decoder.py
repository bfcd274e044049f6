"""The oracle of a member's logits: its decoder in numpy and float64, on the bundle's own dequantised weights.

It rounds where the native kernels say that they round (docs/cpu.md): scales of packed weights to 16 bits, the inputs of a
quantised layer to 8 bits per group, keys and values as the cache holds them; with a bf16 cache also queries and
probabilities. What is left between the two is float32, and values that it moves across a rounding boundary.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import numpy.typing as npt
from motet.runtime.model.bundle import WEIGHTS, Bundle
from motet.runtime.model.layout import EMBEDDING, MLP, POSITIONS, Layer, Linear, Norm, decoder_layout
from motet.runtime.model.stored import own_name, resolve, stored_weight, unpack_nibbles
from safetensors.numpy import load_file

F64 = npt.NDArray[np.float64]
PARTITION = 128  # positions that share a softmax


def round_groups(x: F64, group: int) -> F64:
    """Rows [..., columns] rounded to 8 bits with a scale per group of columns."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    peak = np.abs(groups).max(-1, keepdims=True)
    scale = np.where(peak > 0, peak, 1) / 127
    return (np.rint(groups / scale) * scale).reshape(x.shape)


def bf16(x: F64) -> F64:
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def int8(x: F64) -> F64:
    return round_groups(x, x.shape[-1])


def _rounded(x: np.ndarray, axis: int) -> F64:
    """Half of a low-rank update, rounded to 8 bits with a scale per rank, which is the other axis."""
    peak = np.abs(x.astype(np.float64)).max(axis, keepdims=True)
    return np.asarray(np.rint(127 * x / np.where(peak > 0, peak, 1)) * peak / 127)


class Weight:
    """A stored weight [rows, columns] as packing leaves it; `group` 0: it is dense."""

    def __init__(self, tensors: dict[str, np.ndarray], name: str) -> None:
        stored = stored_weight(tensors, name)
        self.group = stored.group_size
        if stored.bits == 32:
            self.values = tensors[name].astype(np.float64)
            return
        values, scales = tensors[stored.values], tensors[stored.scales]
        if stored.bits == 8:
            steps, minima = values.astype(np.float64) - 128, np.zeros_like(scales)
        else:
            assert stored.minima is not None
            steps, minima = unpack_nibbles(values).astype(np.float64), tensors[stored.minima]
        largest = max(np.abs(scales).max(), np.abs(minima).max())
        factor = 2.0 ** (math.floor(math.log2(largest)) - 13)
        scales, minima = (
            (x.astype(np.float32) / np.float32(factor)).astype(np.float16).astype(np.float64) * factor
            for x in (scales, minima)
        )
        self.values = (steps * scales[..., None] + minima[..., None]).reshape(stored.rows, -1)

    def __call__(self, x: F64) -> F64:
        return np.asarray((round_groups(x, self.group) if self.group else x) @ self.values.T)


def _gelu(x: F64) -> F64:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


NEAR = 0.1  # logits of a router that are closer may change places when activations are rounded


class Oracle:
    """The final states of a bundle's members over a cache of this kind, and the head that makes them logits."""

    def __init__(self, bundle: Bundle, kv_dtype: str) -> None:
        self.bundle, self.config, self.layout = bundle, bundle.config, decoder_layout(bundle.config)
        self.tensors = load_file(bundle.path / WEIGHTS)
        self.bf16 = kv_dtype == "bf16"
        self._weights: dict[str, Weight] = {}
        self.unsure = np.zeros(0, np.bool_)  # [rows] of the last call: whether rounding may choose other experts

    @cached_property
    def head(self) -> Weight:
        return self._weight(self.layout.head)

    @cached_property
    def is_finite(self) -> bool:
        """Whether no weight is so large that activations may overflow."""
        return all(np.abs(x).max() < 1e6 for x in self.tensors.values() if x.dtype == np.float32)

    def hidden(self, tokens: list[int], member: int) -> F64:
        """[tokens, hidden] after the final norm of `member`. Sets `unsure`."""
        self.unsure = np.zeros(len(tokens), np.bool_)
        x = self._weight(EMBEDDING).values[tokens] * self.config.embedding_scale
        if self.config.positions == "learned":
            x = x + self.tensors[POSITIONS][: len(tokens)]
        owner = None
        for index, layer in enumerate(self.layout.layers):
            if len(self.bundle.members) > 1 and index >= self.bundle.split_layer:
                owner = self.bundle.members[member]
            before = x
            qkv = self._linear(layer.qkv, self._norm(layer.attention_norm, x, owner), owner, member)
            added = self._linear(layer.out, self._attend(layer, qkv, owner), owner, member)
            x = x + self._norm(layer.attention_out_norm, added, owner) * self.config.residual_scale
            read = before if layer.parallel else x
            added = self._mlp(layer, self._norm(layer.mlp_norm, read, owner), owner, member)
            x = x + self._norm(layer.mlp_out_norm, added, owner) * self.config.residual_scale
        return self._norm(self.layout.norm, x, self.bundle.members[member])

    def _weight(self, name: str, owner: str | None = None) -> Weight:
        stored = resolve(self.tensors, name, owner)
        if stored not in self._weights:
            self._weights[stored] = Weight(self.tensors, stored)
        return self._weights[stored]

    def _linear(self, linear: Linear, x: F64, owner: str | None, member: int) -> F64:
        y = self._weight(f"{linear.name}.weight", owner)(x)
        if linear.bias:
            y = y + self.tensors[resolve(self.tensors, f"{linear.name}.bias", owner)]
        a, b = (own_name(self.bundle.members[member], f"{linear.name}.{half}") for half in ("lora_a", "lora_b"))
        if a in self.tensors and (owner is not None or len(self.bundle.members) == 1):
            y = y + x @ _rounded(self.tensors[a], 1).T @ _rounded(self.tensors[b], 0).T
        return y

    def logits(self, states: F64) -> F64:
        """[rows, vocab] of final states [rows, hidden]."""
        found, cap = self.head(states) * self.config.logit_scale, self.config.logit_softcap
        return found if cap is None else cap * np.tanh(found / cap)

    def _norm(self, norm: Norm | None, x: F64, owner: str | None) -> F64:
        if norm is None:
            return x
        weight, *bias = (self.tensors[resolve(self.tensors, name, owner)].astype(np.float64) for name in norm.tensors)
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + self.config.norm_eps) * weight
        return np.asarray(y + bias[0] if bias else y)

    def _mlp(self, layer: Layer, x: F64, owner: str | None, member: int) -> F64:
        def run(mlp: MLP) -> F64:
            return self._linear(mlp.down, self._activate(self._linear(mlp.up, x, owner, member)), owner, member)

        if layer.router is None:
            return run(layer.mlp)
        logits = x @ self.tensors[resolve(self.tensors, f"{layer.router}.weight", owner)].T.astype(np.float64)
        count = self.config.experts_per_token
        chosen = np.argsort(-logits, kind="stable")[:, :count]
        if count < self.config.num_experts:
            ordered = -np.sort(-logits)
            self.unsure |= ordered[:, count - 1] - ordered[:, count] < NEAR
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        taken = np.zeros_like(shares)
        np.put_along_axis(taken, chosen, np.take_along_axis(shares, chosen, -1), -1)
        taken /= (taken if self.config.normalises_experts else shares).sum(-1, keepdims=True)
        return np.asarray(sum(run(mlp) * taken[:, index : index + 1] for index, mlp in enumerate(layer.mlps)))

    def _activate(self, inner: F64) -> F64:
        if self.config.activation == "gelu":
            return _gelu(inner)
        if self.config.activation == "gelu_erf":
            return np.asarray(0.5 * inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))))
        gate, up = np.split(inner, 2, -1)
        activated = gate / (1 + np.exp(-gate)) if self.config.activation == "swiglu" else _gelu(gate)
        return np.asarray(activated * up)

    def _attend(self, layer: Layer, qkv: F64, owner: str | None) -> F64:
        c, count = self.config, len(qkv)
        if layer.head_norms and c.qk_norm == "projection":
            parts = np.split(qkv, [c.q_size, c.q_size + c.kv_size], -1)
            parts[:2] = (self._norm(norm, x, owner) for norm, x in zip(layer.head_norms, parts))
            qkv = np.concatenate(parts, -1)
        heads = qkv.reshape(count, -1, c.head_size).transpose(1, 0, 2)  # [heads, tokens, size]
        q, k, v = np.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads])
        if layer.head_norms and c.qk_norm == "head":
            q, k = (self._norm(norm, x, owner) for norm, x in zip(layer.head_norms, (q, k)))
        if layer.rotary is not None:
            cos, sin = (self.tensors[name][:count].astype(np.float64) for name in layer.rotary)
            half = cos.shape[-1]
            q, k = (
                np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
                for a, b, rest in (np.split(x, [half, 2 * half], -1) for x in (q, k))
            )
        q = q * (c.attention_scale or c.head_size**-0.5) / math.log(2)  # powers of 2
        k, v = (bf16(x) if self.bf16 else int8(x) for x in (k, v))
        k, v = (np.repeat(x, c.num_heads // c.num_kv_heads, 0) for x in (k, v))
        scores = (bf16(q) if self.bf16 else q) @ k.transpose(0, 2, 1)
        if c.attention_softcap is not None:
            cap = c.attention_softcap / math.log(2)
            scores = cap * np.tanh(scores / cap)
        at = np.arange(count)
        unseen = at > at[:, None]
        if layer.window is not None:
            unseen |= at <= at[:, None] - layer.window
        scores = np.where(unseen, -np.inf, scores)
        top = scores.max(-1, keepdims=True)
        out, total = np.zeros_like(q), np.zeros_like(top)
        for first in range(0, count, PARTITION):
            part = scores[..., first : first + PARTITION]
            peak = np.maximum(part.max(-1, keepdims=True), top - 1000)
            p, share = np.exp2(part - peak), np.exp2(peak - top)
            out += share * ((bf16(p) if self.bf16 else p) @ v[:, first : first + PARTITION])
            total += share * p.sum(-1, keepdims=True)
        return (out / total).transpose(1, 0, 2).reshape(count, -1)
