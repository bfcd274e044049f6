"""Checkpoints that bitsandbytes has quantised (LLM.int8, NF4, FP4). bitsandbytes itself widens them. Needs torch.

Such a directory has `quantization_config` in its config.json, and, beside each quantised weight, the tensors
that are needed to read it:

    8 bits    `.weight` int8 [out, in], `.SCB` float32 [out] (largest magnitude of each row)
    4 bits    `.weight` uint8 [out · in / 2, 1], `.weight.absmax`, `.weight.quant_map`, `.weight.quant_state.bitsandbytes__nf4`,
              and `.weight.nested_*` if the scales are quantised too

Weights are widened once, when they are read; export and fine-tuning then treat them like those of any checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import BundleError, MissingPackageError, UnsupportedModelError

_PARTS = (
    "SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4",
)  # fmt: skip


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that bitsandbytes quantised the weights. Raises `UnsupportedModelError` for another
    method."""
    found = config.get("quantization_config")
    if found is None:
        return False
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if method is None and isinstance(found, Mapping) and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"  # written by releases without quant_method
    if method != "bitsandbytes":
        raise UnsupportedModelError(
            f"checkpoints quantised by {method!r} are not supported, bitsandbytes' are; pull the model in float"
        )
    return True


def owner(name: str) -> str | None:
    """The weight whose quantisation a stored tensor is a part of; None if the tensor is a weight or a bias."""
    for part in _PARTS:
        if name.endswith(f".{part}"):
            return f"{name.removesuffix(f'.{part}')}.weight"
    return None


def widen(name: str, stored: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Widen the weight `stored`, with its `parts` (name → tensor), to float32 [out, in].

    Raises `MissingPackageError` without bitsandbytes, `BundleError` if the parts do not fit the weight.
    """
    bitsandbytes = _library()
    module = name.removesuffix(".weight")
    try:
        if f"{module}.SCB" in parts:
            return _from_int8(stored, parts[f"{module}.SCB"])
        known = {key.removeprefix(f"{name}."): value for key, value in parts.items()}
        state = bitsandbytes.QuantState.from_dict(known, device=torch.device("cpu"))
        if stored.numel() * 2 < state.shape.numel():
            raise ValueError(f"{stored.numel()} bytes for {tuple(state.shape)}")
        widened: torch.Tensor = bitsandbytes.dequantize_4bit(stored, state)
        return widened.float()
    except (KeyError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
        raise BundleError(f"the quantised weight '{name}' is damaged ({error!r}); pull the model again") from error


def _from_int8(stored: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    if stored.dtype != torch.int8 or largest.shape != stored.shape[:1]:
        raise ValueError(f"{stored.dtype} {tuple(stored.shape)} with {tuple(largest.shape)} scales")
    return stored.float() * (largest.float() / 127)[:, None]


def _library() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MissingPackageError(
            f"this checkpoint was quantised by bitsandbytes, which is not installed ({error}); "
            "install it with `pip install 'motet[qlora]'`, or pull the model in float"
        ) from error
    return functional
