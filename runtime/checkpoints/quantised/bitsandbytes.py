"""Checkpoints that bitsandbytes has quantised (LLM.int8, NF4, FP4). bitsandbytes itself widens them. Needs torch.

Such a directory has `quantization_config` in its config.json, and, beside each quantised weight, the tensors
that are needed to read it:

    8 bits    `.weight` int8 [out, in], `.SCB` float32 [out] (largest magnitude of each row)
    4 bits    `.weight` uint8 [out · in / 2, 1], `.weight.absmax`, `.weight.quant_map`, `.weight.quant_state.bitsandbytes__nf4`,
              and `.weight.nested_*` if the scales are quantised too
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...errors import MissingPackageError
from .method import Settings, Shapes, check

_PARTS = (
    "SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4",
)  # fmt: skip


class BitsAndBytes:
    def __init__(self, settings: Settings) -> None:
        """Which kind it is, the tensors say."""

    def owner(self, name: str) -> str | None:
        for part in _PARTS:
            if name.endswith(f".{part}"):
                return f"{name.removesuffix(f'.{part}')}.weight"
        return None

    def shape(self, weight: str, shapes: Shapes, read: Callable[[str], torch.Tensor]) -> tuple[int, ...]:
        check(weight in shapes, "its quantisation is there without the weight")
        if f"{weight.removesuffix('.weight')}.SCB" in shapes:
            return shapes[weight]
        state = next(name for name in shapes if ".quant_state." in name)
        return tuple(json.loads(bytes(read(state).tolist()))["shape"])

    def widen(self, weight: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Raises `MissingPackageError` without bitsandbytes."""
        bitsandbytes, stored = _library(), parts[weight]
        scales = parts.get(f"{weight.removesuffix('.weight')}.SCB")
        if scales is not None:
            order = parts.get(f"{weight.removesuffix('.weight')}.weight_format")
            check(order is None or not bool(order.any()), "its rows are in an order of a GPU (weight_format)")
            return _from_int8(stored, scales)
        known = {key.removeprefix(f"{weight}."): value for key, value in parts.items() if key != weight}
        state = bitsandbytes.QuantState.from_dict(known, device=torch.device("cpu"))
        stored = stored.contiguous().view(torch.uint8).reshape(-1, 1)  # bytes, in whatever type they are stored
        check(stored.numel() == -(-state.shape.numel() // 2), f"{stored.numel()} bytes for {tuple(state.shape)}")
        widened: torch.Tensor = bitsandbytes.dequantize_4bit(stored, state)
        return widened.float()


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
