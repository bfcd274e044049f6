"""Checkpoints of AWQ (Lin et al. 2024) in AutoAWQ's GEMM form. Beside each module:

    .qweight [in, out / 8] int32     .scales [groups, out]     .qzeros [groups, out / 8] int32

A word has eight outputs of 4 bits, in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .method import Settings, Shapes, check, check_groups, check_packed, group_size, option, unpack

_PARTS = ("qweight", "qzeros", "scales")
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word outputs 0…7 are


class Awq:
    def __init__(self, settings: Settings) -> None:
        """Raises `UnsupportedModelError` for options that are not computed."""
        bits = "bits" if "bits" in settings else "w_bit"
        option(settings, bits, (4,))
        version = settings.get("version") or settings.get("format") or "gemm"
        option({"version": str(version).lower()}, "version", ("gemm",))
        option(settings, "zero_point", (True, False))  # symmetric ones have zero points all the same
        check_packed(settings)
        self.size = group_size(
            settings if "group_size" in settings else {"group_size": settings.get("q_group_size", 128)}
        )

    def owner(self, name: str) -> str | None:
        module, _, part = name.rpartition(".")
        return f"{module}.weight" if part in _PARTS else None

    def shape(self, weight: str, shapes: Shapes, read: Callable[[str], Tensor]) -> tuple[int, ...]:
        check(weight not in shapes, "it is stored twice, quantised and as it was")
        count, words = shapes[f"{weight.removesuffix('weight')}qweight"]
        return words * 8, count

    def widen(self, weight: str, parts: Mapping[str, Tensor]) -> Tensor:
        prefix = weight.removesuffix("weight")
        steps, zeros = (_outputs(parts[f"{prefix}{name}"]) for name in ("qweight", "qzeros"))
        scales = parts[f"{prefix}scales"].float()
        count, groups = len(steps), len(scales)
        check(
            scales.shape == (groups, steps.shape[1]) and zeros.shape == scales.shape, "scales or zero points do not fit"
        )
        size = check_groups(count, groups, self.size)
        wide: Tensor = (steps - zeros.repeat_interleave(size, 0)[:count]) * scales.repeat_interleave(size, 0)[:count]
        return wide.t().contiguous()


def _outputs(words: Tensor) -> Tensor:
    """[rows, out / 8] → [rows, out]."""
    return unpack(words, 4, 1).reshape(len(words), -1, 8)[:, :, list(_PLACES)].flatten(1)
