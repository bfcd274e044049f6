"""A bundle's tensors as the torch backend uses them: on the device, in its dtype, stacked where kernels want it.

Quantised weights stay as they are stored ("stored"), or are widened once ("dense": for a CPU, where widening at every step
would be all that it does). A bundle's 4-bit group-sum columns and whole zero points become one minimum a group:

    minimum = −zero_point · scale + group-sum column        w = q · scale + minimum
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ....kernels.oracle.eager import dequantise
from ....kernels.oracle.operands import AdapterWeight, LinearWeight
from ...errors import BundleError
from ...model.bundle import WEIGHTS, Bundle
from ...model.config import DecoderConfig

Array = npt.NDArray[Any]
Tensor = torch.Tensor


def _nibbles(packed: Array) -> Array:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def linear_weight(values: Array, scales: Array, zero_points: Array | None, columns: int) -> LinearWeight:
    """A quantised weight from a bundle's arrays (docs/bundle.md) on the CPU; `columns` is K."""
    n, groups = scales.shape
    if zero_points is None:
        flat = torch.from_numpy(np.ascontiguousarray(values.reshape(n, -1)))
        return LinearWeight(flat, torch.from_numpy(np.ascontiguousarray(scales.T)))
    group_size = 2 * values.shape[2]
    own = columns // group_size  # the groups behind are the group-sum columns
    zeros = _nibbles(zero_points)[:, :groups].astype(np.float32)
    sums = _nibbles(values[:, own:]).astype(np.float32) - zeros[:, own:, None]
    sums = (sums * scales[:, own:, None]).reshape(n, -1)[:, :own]
    minima = sums - zeros[:, :own] * scales[:, :own]
    return LinearWeight(
        torch.from_numpy(np.ascontiguousarray(values[:, :own].reshape(n, -1))),
        torch.from_numpy(np.ascontiguousarray(scales[:, :own].T)),
        torch.from_numpy(np.ascontiguousarray(minima.T.astype(np.float32))),
    )


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how tensors are kept. `keep_quantised` False: widened to `dtype`."""

    device: torch.device
    dtype: torch.dtype
    keep_quantised: bool

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).to(self.device)

    def linear(self, weight: LinearWeight) -> LinearWeight:
        bias = None if weight.bias is None else weight.bias.float().to(self.device)
        if weight.scales is None or not self.keep_quantised:
            return LinearWeight(self.dense(dequantise(weight)), bias=bias)
        # float16 on a GPU: 11 bits of a scale are more than 8-bit values need, and it halves what a step reads of them
        kind = torch.float32 if self.dtype is torch.float32 else torch.float16
        scales = [None if t is None else t.to(kind).to(self.device) for t in (weight.scales, weight.minima)]
        return LinearWeight(weight.values.to(self.device), scales[0], scales[1], bias)


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor  # [size] float32
    bias: Tensor | None  # of a layer norm


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A fused projection and its low-rank updates, if any member has one here."""

    weight: LinearWeight
    adapter: AdapterWeight | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: Norm
    qkv: LinearLayer
    head_norms: tuple[Tensor, Tensor] | None  # of query and key heads
    out: LinearLayer
    mlp_norm: Norm
    up: LinearLayer  # gate and up, where the activation is gated
    down: LinearLayer


@dataclass(frozen=True, slots=True)
class TailWeights:
    """Layers from the split on, and the final norm."""

    layers: Sequence[LayerWeights]
    norm: Norm


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All of a bundle. `tail_of[member]` indexes `tails`: members without layers of their own share the base's.
    `adapter_of[member]` indexes the stacked low-rank updates, -1 for none."""

    embedding: LinearWeight
    position_embedding: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    trunk: Sequence[LayerWeights]
    tails: Sequence[TailWeights]
    tail_of: tuple[int, ...]
    adapter_of: tuple[int, ...]
    head: LinearWeight

    @property
    def num_bytes(self) -> int:
        """What one decode step with every tail reads."""
        layers = [*self.trunk, *(layer for tail in self.tails for layer in tail.layers)]
        linears = [linear.weight for layer in layers for linear in (layer.qkv, layer.out, layer.up, layer.down)]
        return sum(weight.num_bytes for weight in (*linears, self.head))


def load_weights(bundle: Bundle, placement: Placement) -> ModelWeights:
    """Read a bundle's tensors. Raises `BundleError` if one is missing or the file is torn."""
    path = bundle.path / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"'{path}' is torn or damaged ({error}); copy or export the bundle again") from error
    return ModelReader(tensors, bundle.config, placement, bundle.members, bundle.kinds).read(bundle.split_layer)


class ModelReader:
    """From named arrays (docs/bundle.md) to `ModelWeights`."""

    def __init__(
        self,
        tensors: Mapping[str, Array],
        config: DecoderConfig,
        placement: Placement,
        members: Sequence[str],
        kinds: Sequence[str],
    ) -> None:
        self._tensors = tensors
        self._config = config
        self._placement = placement
        self._members = members
        self._adapters = [name for name, kind in zip(members, kinds, strict=True) if kind == "adapter"]

    def read(self, split_layer: int) -> ModelWeights:
        config, placement = self._config, self._placement
        has_own = [
            any(n.startswith(f"members.{m}.model.") and ".lora_" not in n for n in self._tensors) for m in self._members
        ]
        own = [name for name, found in zip(self._members, has_own) if found]
        prefixes = [f"members.{name}." for name in own]
        if not all(has_own):
            prefixes.append("")
        tails = [self._tail(prefix, split_layer) for prefix in prefixes]
        embedding = self._linear_weight("", "model.embed_tokens", config.hidden_size)
        rotary = None
        if config.positions == "rotary":
            cos, sin = (self._array("", f"rotary.{name}").astype(np.float32) for name in ("cos", "sin"))
            rotary = (torch.from_numpy(cos).to(placement.device), torch.from_numpy(sin).to(placement.device))
        learned = config.positions == "learned"
        return ModelWeights(
            embedding=embedding,
            position_embedding=self._dense("", "model.embed_positions.weight") if learned else None,
            rotary=rotary,
            trunk=[self._layer("", index) for index in range(split_layer)],
            tails=tails,
            tail_of=tuple(own.index(m) if m in own else len(own) for m in self._members),
            adapter_of=tuple(self._adapters.index(m) if m in self._adapters else -1 for m in self._members),
            head=embedding if config.tied_head else self._linear_weight("", "lm_head", config.hidden_size),
        )

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _tail(self, prefix: str, split: int) -> TailWeights:
        layers = [self._layer(prefix, index) for index in range(split, self._config.num_layers)]
        return TailWeights(layers, self._norm(prefix, "model.norm"))

    def _layer(self, prefix: str, index: int) -> LayerWeights:
        config, name = self._config, f"model.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        heads = None
        if config.qk_norm:
            heads = (
                self._exact(prefix, f"{attention}.q_norm.weight"),
                self._exact(prefix, f"{attention}.k_norm.weight"),
            )
        up = "gate_up_proj" if config.activation == "swiglu" else "up_proj"
        hidden = config.hidden_size
        return LayerWeights(
            attention_norm=self._norm(prefix, f"{name}.input_layernorm"),
            qkv=self._linear(prefix, f"{attention}.qkv_proj", hidden),
            head_norms=heads,
            out=self._linear(prefix, f"{attention}.o_proj", config.q_size),
            mlp_norm=self._norm(prefix, f"{name}.post_attention_layernorm"),
            up=self._linear(prefix, f"{mlp}.{up}", hidden),
            down=self._linear(prefix, f"{mlp}.down_proj", config.intermediate_size),
        )

    def _norm(self, prefix: str, name: str) -> Norm:
        bias = self._exact(prefix, f"{name}.bias") if self._config.norm == "layer" else None
        return Norm(self._exact(prefix, f"{name}.weight"), bias)

    def _linear(self, prefix: str, name: str, columns: int) -> LinearLayer:
        adapters = [] if prefix else self._adapters  # a low-rank update is of the base
        return LinearLayer(self._linear_weight(prefix, name, columns), self._adapter(name, adapters))

    def _linear_weight(self, prefix: str, name: str, columns: int) -> LinearWeight:
        weight = f"{name}.weight"
        # What belongs to one weight comes from one place: a member's own 8 bits have no zero points, the base's 4 bits do.
        source = prefix if {f"{prefix}{weight}", f"{prefix}{weight}.values"} & self._tensors.keys() else ""
        if f"{source}{weight}.values" in self._tensors:
            found = linear_weight(
                self._tensors[f"{source}{weight}.values"],
                self._array(source, f"{weight}.scales"),
                self._tensors.get(f"{source}{weight}.zero_points"),
                columns,
            )
        else:
            found = LinearWeight(torch.from_numpy(self._array(source, weight)))
        bias = self._find(prefix, f"{name}.bias")
        if bias is not None:
            found = LinearWeight(found.values, found.scales, found.minima, torch.from_numpy(bias))
        return self._placement.linear(found)

    def _adapter(self, name: str, members: Iterable[str]) -> AdapterWeight | None:
        """The members' low-rank updates of one module, padded to the largest rank; zeros for who has none here."""
        pairs = [
            tuple(self._tensors.get(f"members.{member}.{name}.lora_{part}") for part in "ab") for member in members
        ]
        present = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not present:
            return None
        rank = max(len(a) for a, _ in present)
        stacked_a = np.zeros((len(pairs), rank, present[0][0].shape[1]), np.float32)
        stacked_b = np.zeros((len(pairs), len(present[0][1]), rank), np.float32)
        for index, (a, b) in enumerate(pairs):
            if a is not None and b is not None:
                stacked_a[index, : len(a)] = a
                stacked_b[index, :, : len(a)] = b
        return AdapterWeight(
            self._placement.dense(torch.from_numpy(stacked_a)), self._placement.dense(torch.from_numpy(stacked_b))
        )

    def _find(self, prefix: str, name: str) -> Array | None:
        """The member's own tensor, else the base's."""
        own = self._tensors.get(prefix + name) if prefix else None
        return own if own is not None else self._tensors.get(name)

    def _array(self, prefix: str, name: str) -> Array:
        found = self._find(prefix, name)
        if found is None:
            raise BundleError(f"the bundle has no tensor '{prefix}{name}'; export it again")
        return found

    def _exact(self, prefix: str, name: str) -> Tensor:
        """In float32, whatever the model's dtype: small, and outlier channels are moved into norms."""
        return torch.from_numpy(self._array(prefix, name)).float().to(self._placement.device)

    def _dense(self, prefix: str, name: str) -> Tensor:
        return self._placement.dense(torch.from_numpy(self._array(prefix, name)))
