"""A bundle's tensors as the torch backend uses them: on the device, in its dtype, stacked if the kernels need it.

Quantised weights are kept as they are stored, or widened once when they are loaded (on a CPU, where widening at every
step would take most of the time).
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
from ...model import layout
from ...model.bundle import WEIGHTS, Bundle
from ...model.config import DecoderConfig
from ...model.members import MemberKind
from ...model.stored import own_name, resolve, stored_weight

Array = npt.NDArray[Any]
Tensor = torch.Tensor


def linear_weight(values: Array, scales: Array, minima: Array | None) -> LinearWeight:
    """A quantised weight from a bundle's arrays (`model.stored`) on the CPU."""
    halves = [None if a is None else torch.from_numpy(np.ascontiguousarray(a.T)) for a in (scales, minima)]
    return LinearWeight(torch.from_numpy(np.ascontiguousarray(values.reshape(len(values), -1))), *halves)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how tensors are kept. If `keep_quantised` is False, quantised weights are widened to `dtype`."""

    device: torch.device
    dtype: torch.dtype
    keep_quantised: bool

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).to(self.device)

    def linear(self, weight: LinearWeight) -> LinearWeight:
        bias = None if weight.bias is None else weight.bias.float().to(self.device)
        if weight.scales is None or not self.keep_quantised:
            return LinearWeight(self.dense(dequantise(weight)), bias=bias)
        # float16 on a GPU: 11 bits are more than 8-bit values need, and a step reads half as many bytes of scales
        kind = torch.float32 if self.dtype is torch.float32 else torch.float16
        scales = [None if t is None else t.to(kind).to(self.device) for t in (weight.scales, weight.minima)]
        return LinearWeight(weight.values.to(self.device), scales[0], scales[1], bias)


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor  # [size] float32
    bias: Tensor | None  # [size] float32, layer norms only


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A fused projection, and the members' low-rank updates of it if there are any."""

    weight: LinearWeight
    adapter: AdapterWeight | None


@dataclass(frozen=True, slots=True)
class MLPWeights:
    up: LinearLayer
    activation: str  # "swiglu", "geglu": `up` is gate and up; "gelu", "gelu_erf"
    down: LinearLayer


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: Norm | None
    qkv: LinearLayer
    head_norms: tuple[Tensor, Tensor] | None  # weights of the norms of queries and keys
    out: LinearLayer
    mlp_norm: Norm | None
    mlps: Sequence[MLPWeights]  # one, or the experts
    router: LinearWeight | None = None  # of the experts
    attention_out_norm: Norm | None = None
    parallel: bool = False  # see `layout.Layer`
    mlp_out_norm: Norm | None = None
    rotary: tuple[str, str] | None = layout.ROTARY  # names of its tables (cosines, sines); None: it does not rotate
    window: int | None = None  # positions that a row attends to, itself included; None: all before it


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights of a bundle. `tails`: the layers from the split on, of the base and of members that have their own.
    `tail_of[member]` is an index into them. `norms[member]`: the final norm; members without their own have the same
    object. `adapter_of[member]` is an index into the stacked low-rank updates, -1 for none."""

    embedding: LinearWeight
    position_embedding: Tensor | None
    rotary: Mapping[tuple[str, str], tuple[Tensor, Tensor]]  # by the tables' names
    trunk: Sequence[LayerWeights]
    tails: Sequence[Sequence[LayerWeights]]
    tail_of: tuple[int, ...]
    norms: Sequence[Norm]
    adapter_of: tuple[int, ...]
    head: LinearWeight

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that a decode step with every tail reads, if some row of it chooses each expert."""
        layers = [*self.trunk, *(layer for tail in self.tails for layer in tail)]
        linears = [linear.weight for layer in layers for linear in (layer.qkv, layer.out)]
        linears += [part.weight for layer in layers for mlp in layer.mlps for part in (mlp.up, mlp.down)]
        linears += [layer.router for layer in layers if layer.router is not None]
        return sum(weight.num_bytes for weight in (*linears, self.head))


def load_weights(bundle: Bundle, placement: Placement) -> ModelWeights:
    """Read a bundle's tensors. Raises `BundleError` if one is missing or the file is torn."""
    path = bundle.path / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"'{path}' is torn or damaged ({error}); copy or export the bundle again") from error
    return ModelReader(tensors, bundle.config, placement, bundle.members, bundle.kinds).read(
        bundle.split_layer, bundle.tails, bundle.tail_of
    )


class ModelReader:
    """Makes `ModelWeights` from named arrays (see `model.stored`)."""

    def __init__(
        self,
        tensors: Mapping[str, Array],
        config: DecoderConfig,
        placement: Placement,
        members: Sequence[str],
        kinds: Sequence[MemberKind],
    ) -> None:
        self._tensors = tensors
        self._config = config
        self._placement = placement
        self._members = members
        self._adapters = [name for name, kind in zip(members, kinds, strict=True) if kind is MemberKind.ADAPTER]

    def read(self, split_layer: int, owners: Sequence[str | None], tail_of: Sequence[int]) -> ModelWeights:
        """`owners`, `tail_of`: `Bundle.tails` and `Bundle.tail_of`. A single member runs a tail without layers."""
        config = self._config
        table = layout.decoder_layout(config)
        tails = [[self._layer(layer, owner) for layer in table.layers[split_layer:]] for owner in owners or (None,)]
        norm = self._norm(table.norm, None)
        embedding = self._linear_weight(layout.EMBEDDING, None, None)
        rotary = {names: (self._exact(names[0], None), self._exact(names[1], None)) for names in table.rotary_tables}
        learned = config.positions == "learned"
        return ModelWeights(
            embedding=embedding,
            position_embedding=self._dense(layout.POSITIONS) if learned else None,
            rotary=rotary,
            trunk=[self._layer(layer, None) for layer in table.layers[:split_layer]],
            tails=tails,
            tail_of=tuple(tail_of or (0,)),
            norms=[self._norm(table.norm, m) if self._has_own(table.norm, m) else norm for m in self._members],
            adapter_of=tuple(self._adapters.index(m) if m in self._adapters else -1 for m in self._members),
            head=embedding if config.tied_head else self._linear_weight(table.head, None, None),
        )

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _has_own(self, norm: layout.Norm, member: str) -> bool:
        return any(own_name(member, name) in self._tensors for name in norm.tensors)

    def _layer(self, layer: layout.Layer, member: str | None) -> LayerWeights:
        heads = None
        if layer.head_norms is not None:
            q_norm, k_norm = (self._norm(norm, member).weight for norm in layer.head_norms)
            heads = (q_norm, k_norm)
        return LayerWeights(
            attention_norm=self._optional(layer.attention_norm, member),
            qkv=self._linear(layer.qkv, member),
            head_norms=heads,
            out=self._linear(layer.out, member),
            mlp_norm=self._optional(layer.mlp_norm, member),
            mlps=[
                MLPWeights(self._linear(mlp.up, member), mlp.up.epilogue, self._linear(mlp.down, member))
                for mlp in layer.mlps
            ],
            router=None if layer.router is None else self._linear_weight(f"{layer.router}.weight", None, member),
            attention_out_norm=self._optional(layer.attention_out_norm, member),
            mlp_out_norm=self._optional(layer.mlp_out_norm, member),
            parallel=layer.parallel,
            rotary=layer.rotary,
            window=layer.window,
        )

    def _optional(self, norm: layout.Norm | None, member: str | None) -> Norm | None:
        return None if norm is None else self._norm(norm, member)

    def _norm(self, norm: layout.Norm, member: str | None) -> Norm:
        weight, *bias = (self._exact(name, member) for name in norm.tensors)
        return Norm(weight, bias[0] if bias else None)

    def _linear(self, linear: layout.Linear, member: str | None) -> LinearLayer:
        adapters = [] if member else self._adapters  # low-rank updates belong to the base's layers only
        bias = f"{linear.name}.bias" if linear.bias else None
        weight = self._linear_weight(f"{linear.name}.weight", bias, member)
        return LinearLayer(weight, self._adapter(linear.name, adapters))

    def _linear_weight(self, name: str, bias_name: str | None, member: str | None) -> LinearWeight:
        stored = stored_weight(self._tensors, resolve(self._tensors, name, member))
        bias = None if bias_name is None else torch.from_numpy(self._array(bias_name, member))
        if stored.bits == 32:
            return self._placement.linear(LinearWeight(torch.from_numpy(self._tensors[stored.name]), bias=bias))
        minima = None if stored.minima is None else self._tensors[stored.minima]
        found = linear_weight(self._tensors[stored.values], self._tensors[stored.scales], minima)
        return self._placement.linear(LinearWeight(found.values, found.scales, found.minima, bias))

    def _adapter(self, name: str, members: Iterable[str]) -> AdapterWeight | None:
        """The members' low-rank updates of one module, padded to the largest rank. A member without an update has
        zeros."""
        pairs = [
            tuple(self._tensors.get(own_name(member, f"{name}.{half}")) for half in ("lora_a", "lora_b"))
            for member in members
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

    def _array(self, name: str, member: str | None) -> Array:
        found = self._tensors.get(resolve(self._tensors, name, member))
        if found is None:
            raise BundleError(f"the bundle has no tensor '{name}'; export it again")
        return found

    def _exact(self, name: str, member: str | None) -> Tensor:
        """A tensor in float32, whatever the model's dtype: norms are small, and equalisation moves outlier channels
        into them."""
        return torch.from_numpy(self._array(name, member)).float().to(self._placement.device)

    def _dense(self, name: str) -> Tensor:
        return self._placement.dense(torch.from_numpy(self._array(name, None)))
