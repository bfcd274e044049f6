"""Checkpoints of GPTQ (Frantar et al. 2023), as AutoGPTQ and GPTQModel write them. Beside each module:

    .qweight [in · bits / 32, out] int32     .scales [groups, out]     .qzeros [groups, out · bits / 32] int32
    .g_idx [in] int32: the group of each input; without it, groups are neighbours

The first format stores zero points less one. It has no place for a zero point of 0: tools differ in what they make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from .method import Settings, Shapes, check, check_groups, check_packed, group_size, option, unpack

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class Gptq:
    def __init__(self, settings: Settings) -> None:
        """Raises `UnsupportedModelError` for options that are not computed."""
        self.bits: int = option(settings, "bits", (4, 2, 3, 8))
        self.size, self.ordered = group_size(settings), bool(settings.get("desc_act"))
        check_packed(settings)
        option(settings, "is_marlin_format", (False, None))
        written = {settings[name] for name in ("checkpoint_format", "format") if settings.get(name)}
        if len(written) > 1:
            raise UnsupportedModelError(f"quantization_config has two formats, {sorted(written)}")
        named = option(
            {"checkpoint_format": written.pop()} if written else {}, "checkpoint_format", ("gptq", "gptq_v2")
        )
        self.offset = 0 if named == "gptq_v2" else 1

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
        zeros = unpack(parts[f"{prefix}qzeros"], self.bits, 1)
        count, groups, most = len(steps), len(scales), 2**self.bits - 1
        if self.offset and bool((zeros == most).any()):
            raise UnsupportedModelError(
                f"'{weight}' has zero points of 0 in GPTQ's first format, which tools read in different ways; write the "
                "checkpoint as gptq_v2, or pull the model in float"
            )
        check(
            scales.shape == (groups, steps.shape[1]) and zeros.shape == scales.shape, "scales or zero points do not fit"
        )
        index = self._groups(parts.get(f"{prefix}g_idx"), count, groups)
        wide: Tensor = (steps - (zeros + self.offset)[index]) * scales[index]
        return wide.t().contiguous()

    def _groups(self, index: Tensor | None, count: int, groups: int) -> Tensor:
        """[in] the group of each input."""
        size = check_groups(count, groups, self.size)
        if index is None or (groups > 1 and not bool(index.any())):  # some tools write zeros for none
            check(not self.ordered, "there is no g_idx, and desc_act is set")
            return torch.arange(count) // size
        check(index.shape == (count,), f"g_idx of {tuple(index.shape)} for {count} inputs")
        check(bool(((index >= 0) & (index < groups)).all()), "g_idx names groups that are not there")
        return index.long()
