"""Group-wise weight quantisation, in the layouts that ONNX Runtime's `MatMulNBits` and the native kernels read.

A linear layer's weight [N, K] is cut into groups of `group_size` along K.

    8 bits    symmetric: w ≈ (q − 128)·scale, q in 1…255
    4 bits    affine: w ≈ q·scale + minimum, q in 0…15

`MatMulNBits` accepts only whole-number zero points, and rounding the minimum to a whole step costs as much as quantising
to 4 bits itself (10 % of NLL on a checkpoint whose weights lie on such a grid). So the part of the minimum that a whole
zero point cannot express, r = minimum + zero_point·scale, is stored in further *group-sum columns*: column K + j of the
quantised matrix holds r of group j, and multiplies the sum of the activations of group j. This is 1 / group_size more
work, and r is exact to 4 bits. Source of the operator: ONNX Runtime, `com.microsoft.MatMulNBits`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..runtime.errors import ConfigError
from ..runtime.model.stored import own_groups, unpack_nibbles

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

GROUP_SIZES = (16, 32, 64, 128)
HEAD_GROUP = 32  # the head's error is the largest part of all; its weights are a fifth of a small model's


def layer_group(bits: int, columns: int, group_size: int | None) -> int:
    """Columns per group of a layer's weight: `group_size` if it is set. Otherwise 64 for 8 bits (with 32, scales are
    a fifth of the arithmetic), and 32 for 4 bits or if 64 does not divide the columns."""
    if group_size is not None:
        return group_size
    return 64 if bits == 8 and columns % 64 == 0 else 32


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised weight [N, K]. With 4 bits, the groups cover K and the group-sum columns; low nibbles come first."""

    bits: int
    num_columns: int  # of the quantised matrix: K, with 4 bits K + K / group_size
    values: U8  # [N, groups, group_size * bits / 8]
    scales: F32  # [N, groups]
    zero_points: U8 | None  # 4 bits only: [N, ceil(groups / 2)], two per byte, low nibble first


def check_group(name: str, columns: int, group_size: int) -> None:
    """Raises `ConfigError` if a weight with so many columns cannot have groups of this size; it says which fit."""
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"{name}: group_size must be one of {GROUP_SIZES}, got {group_size}")
    if columns % group_size:
        fitting = [size for size in GROUP_SIZES if columns % size == 0]
        remedy = f"these fit: {fitting}" if fitting else "none fits: export with 32 bits"
        raise ConfigError(f"{name}: group_size {group_size} does not divide its {columns} columns; {remedy}")


def quantise(weight: F32, bits: int, group_size: int, *, name: str = "weight") -> Quantised:
    """Quantise `weight` [N, K]. Raises `ConfigError` for sizes that the kernels do not read."""
    if bits not in (4, 8):
        raise ConfigError(f"{name}: bits must be 4 or 8, got {bits}")
    check_group(name, weight.shape[1], group_size)
    return _quantise_8(weight, group_size) if bits == 8 else _quantise_4(weight, group_size)


def _quantise_8(weight: F32, group_size: int) -> Quantised:
    groups = weight.reshape(len(weight), -1, group_size)  # [N, groups, group_size]
    scales = _nonzero(np.abs(groups).max(axis=2) / np.float32(127))
    values = np.rint(groups / scales[:, :, None]) + 128
    return Quantised(8, weight.shape[1], values.astype(np.uint8), scales, None)


def _quantise_4(weight: F32, group_size: int) -> Quantised:
    groups = weight.reshape(len(weight), -1, group_size)
    minimum = groups.min(axis=2)
    scales = _nonzero((groups.max(axis=2) - minimum) / np.float32(15))
    values = np.clip(np.rint((groups - minimum[:, :, None]) / scales[:, :, None]), 0, 15)
    zero_points = np.clip(np.rint(-minimum / scales), 0, 15)
    remainder = minimum + zero_points * scales  # [N, groups] what the whole zero point cannot express
    padding = -remainder.shape[1] % group_size
    sums = np.pad(remainder, ((0, 0), (0, padding))).reshape(len(weight), -1, group_size)
    sum_low = sums.min(axis=2).clip(max=0)
    sum_scales = _nonzero((sums.max(axis=2).clip(min=0) - sum_low) / np.float32(15))
    sum_zero_points = np.rint(-sum_low / sum_scales)
    sum_values = np.clip(np.rint(sums / sum_scales[:, :, None]) + sum_zero_points[:, :, None], 0, 15)
    return Quantised(
        4,
        weight.shape[1] + groups.shape[1],
        _pack_nibbles(np.concatenate([values, sum_values], axis=1).astype(np.uint8)),
        np.concatenate([scales, sum_scales], axis=1).astype(np.float32),
        _pack_nibbles(np.concatenate([zero_points, sum_zero_points], axis=1).astype(np.uint8)),
    )


def dequantise(quantised: Quantised) -> F32:
    """The weight [N, K] that the quantised one represents, group-sum columns included."""
    groups, group_size = quantised.scales.shape[1], quantised.values.shape[2] * 8 // quantised.bits
    if quantised.bits == 8:
        steps = quantised.values.astype(np.float32) - 128
        return np.asarray((steps * quantised.scales[:, :, None]).reshape(len(steps), -1))
    assert quantised.zero_points is not None
    zero_points = unpack_nibbles(quantised.zero_points)[:, :groups].astype(np.float32)
    steps = unpack_nibbles(quantised.values).reshape(len(zero_points), groups, group_size) - zero_points[:, :, None]
    flat = (steps * quantised.scales[:, :, None]).reshape(len(steps), -1)[:, : quantised.num_columns]
    num_columns = own_groups(groups, group_size) * group_size
    weight, sums = flat[:, :num_columns], flat[:, num_columns:]
    return np.asarray(weight + np.repeat(sums, group_size, axis=1), dtype=np.float32)


def _nonzero(scales: F32) -> F32:
    """Replace scales of 0 by 1: they belong to groups of equal values, for which any scale is right."""
    return np.where(scales > 0, scales, np.float32(1)).astype(np.float32)


def _pack_nibbles(values: U8) -> U8:
    """Pack two values per byte along the last axis, low nibble first; an odd end is padded with 0."""
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    return np.asarray(values[..., 0::2] | (values[..., 1::2] << 4))
