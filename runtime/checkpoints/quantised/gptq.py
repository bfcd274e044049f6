"""Checkpoints of GPTQ (Frantar et al. 2023), as AutoGPTQ and GPTQModel write them. Beside each module:

    .qweight [in · bits / 32, out] int32     .scales [groups, out]     .qzeros [groups, out · bits / 32] int32
    .g_idx [in] int32: the group of each input; without it, groups are neighbours

The first format stores zero points less one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from .method import Settings, Shapes, check, option, unpack

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class Gptq:
    def __init__(self, settings: Settings) -> None:
        """Raises `UnsupportedModelError` for options that are not computed."""
        self.bits: int = option(settings, "bits", (4, 2, 3, 8))
        option(settings, "pack_dtype", ("int32", None))
        option(settings, "is_marlin_format", (False, None))
        written = {settings[name] for name in ("checkpoint_format", "format") if settings.get(name)}
        if len(written) > 1:
            raise UnsupportedModelError(f"quantization_config has two formats, {sorted(written)}")
        named = option(
            {"checkpoint_format": written.pop()} if written else {}, "checkpoint_format", ("gptq", "gptq_v2")
        )
        self.offset = 0 if named == "gptq_v2" else 1
        for pattern in settings.get("dynamic") or {}:
            if not pattern.startswith("-"):  # those with a minus are modules that are not quantised
                raise UnsupportedModelError(f"quantization_config has options of its own for '{pattern}'")

    def owner(self, name: str) -> str | None:
        module, _, part = name.rpartition(".")
        return f"{module}.weight" if part in _PARTS else None

    def shape(self, weight: str, shapes: Shapes, read: Callable[[str], Tensor]) -> tuple[int, ...]:
        check(weight not in shapes, "it is stored twice, quantised and as it was")
        words, out = shapes[f"{weight.removesuffix('weight')}qweight"]
        return out, words * 32 // self.bits

    def widen(self, weight: str, parts: Mapping[str, Tensor]) -> Tensor:
        prefix = weight.removesuffix("weight")
        steps = unpack(parts[f"{prefix}qweight"], self.bits, 0)  # [in, out]
        scales = parts[f"{prefix}scales"].float()
        zeros = unpack(parts[f"{prefix}qzeros"], self.bits, 1) + self.offset & 2**self.bits - 1
        count, groups = len(steps), len(scales)
        check(
            scales.shape == (groups, steps.shape[1]) and zeros.shape == scales.shape, "scales or zero points do not fit"
        )
        index = parts.get(f"{prefix}g_idx")
        if index is None:
            check(count % groups == 0, f"{count} inputs in {groups} groups")
            index = torch.arange(count) // (count // groups)
        check(index.shape == (count,), f"g_idx of {tuple(index.shape)} for {count} inputs")
        check(bool(((index >= 0) & (index < groups)).all()), "g_idx names groups that are not there")
        wide: Tensor = (steps - zeros[index.long()]) * scales[index.long()]
        return wide.t().contiguous()
