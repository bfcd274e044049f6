"""The adapter checkpoint (LoRA, Hu et al. 2021): adapter.safetensors and its manifest adapter.json.

For every adapted linear layer, under its canonical module name (`model.layers.0.self_attn.q_proj` …):

    <module>.lora_a   [rank, K] float32
    <module>.lora_b   [N, rank] float32, with the scale alpha / rank folded in

The layer computes y = W x + B (A x); the merged weight is W + B A. The files hold no pickle and no code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BundleError, ConfigError
from ...model.layout import decoder_layout
from ...model.members import MemberKind
from ..decoder import Decoder
from .files import MemberFormat


def write_adapter(
    out: Path, manifest: Mapping[str, Any], weights: Mapping[str, Tensor], files: Mapping[str, str] | None = None
) -> None:
    """Write an adapter directory, as a whole or not at all. Raises `ConfigError` if `out` exists and is something
    else."""
    ADAPTER.write(out, manifest, {name: tensor.float() for name, tensor in weights.items()}, files)


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(manifest, tensors). Raises `NotFoundError`, `BundleError` (damaged, or halves of a pair missing)."""
    return ADAPTER.read(path)


def adapted_modules(weights: Mapping[str, Any]) -> list[str]:
    """The adapted modules, sorted. Raises `BundleError` for a tensor that is no half of a pair."""
    modules = sorted({name.rpartition(".")[0] for name in weights})
    expected = {f"{module}.{half}" for module in modules for half in ("lora_a", "lora_b")}
    if expected != set(weights):
        raise BundleError(
            f"an adapter has lora_a and lora_b of each module; wrong are {sorted(expected ^ set(weights))[:4]}"
        )
    return modules


def check_shapes(weights: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raises `BundleError` unless every pair fits its linear layer in `base` (canonical name → array [N, K])."""
    for module in adapted_modules(weights):
        a, b, weight = weights[f"{module}.lora_a"], weights[f"{module}.lora_b"], base.get(f"{module}.weight")
        if weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            found = "no such layer" if weight is None else f"a weight {tuple(weight.shape)}"
            raise BundleError(
                f"the adapter's '{module}' has A {tuple(a.shape)} and B {tuple(b.shape)}, the base has {found}; "
                "use the base that it was trained on"
            )


def merge(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changed weights W + B A, and no others, in float32. Raises `BundleError` if the adapter does not fit."""
    check_shapes(adapter, base)
    return {
        f"{module}.weight": base[f"{module}.weight"].float() + adapter[f"{module}.lora_b"] @ adapter[f"{module}.lora_a"]
        for module in adapted_modules(adapter)
    }


ADAPTER = MemberFormat(MemberKind.ADAPTER, 1, check=adapted_modules, merged=merge)


class AdapterLinear(nn.Module):
    """A frozen linear layer with an adapter: y = W x + B (A x)."""

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(lora_a, requires_grad=False)
        self.lora_b = nn.Parameter(lora_b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] → [..., N]
        result: Tensor = self.base(x)
        return result + (x @ self.lora_a.T) @ self.lora_b.T


def attach(decoder: Decoder, adapter: Mapping[str, Tensor]) -> Decoder:
    """Add an adapter to the layers of `decoder`, in place. Raises `BundleError` if it does not fit."""
    check_shapes(adapter, dict(decoder.named_parameters()))
    for module in adapted_modules(adapter):
        parent, _, name = module.rpartition(".")
        linear = decoder.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        pair = adapter[f"{module}.lora_a"], adapter[f"{module}.lora_b"]
        setattr(decoder.get_submodule(parent), name, AdapterLinear(linear, *pair))
    return decoder


def random_adapter(
    decoder: Decoder, targets: tuple[str, ...] | None, rank: int, *, seed: int, scale: float
) -> dict[str, Tensor]:
    """A random adapter, for tests and for timing. B A x has about the size `scale` · |x|. `targets`: short names of
    projections; None: all. Raises `ConfigError`."""
    known = decoder_layout(decoder.config).targets
    targets = known if targets is None else targets
    unknown = sorted(set(targets) - set(known))
    if unknown or rank < 1:
        raise ConfigError(f"an adapter has a rank of at least 1 and targets of {known}, got {rank} and {unknown}")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, linear in decoder.named_modules():
        if isinstance(linear, nn.Linear) and module.endswith(targets):
            a = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
            tensors[f"{module}.lora_a"] = a
            tensors[f"{module}.lora_b"] = scale * torch.randn(linear.out_features, rank, generator=generator)
    return tensors
