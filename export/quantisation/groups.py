"""Group-wise weight quantisation, in the layout that bundles store (`runtime/model/stored.py`).

A linear layer's weight [N, K] is cut into groups of `group_size` along K.

    8 bits    symmetric: w ≈ (q − 128)·scale, q in 1…255
    4 bits    affine: w ≈ q·scale + minimum, q in 0…15

Scales and minima have 16 bits unless a tensor's values need the range of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.errors import ConfigError
from ...runtime.model.stored import unpack_nibbles

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]  # float16 or float32

_NORMAL, _SMALLEST, _LARGEST = 2.0**-14, 2.0**-24, 65504.0  # of float16

GROUP_SIZES = (16, 32, 64, 128)
_AT_ONCE = 2**22  # weights that are rounded together
HEAD_GROUP = 32  # the head's error is the largest part of all; its weights are a fifth of a small model's


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight is stored; `bits` 32: as it is, without groups."""

    bits: int
    group_size: int = 0


def layer_group(bits: int, columns: int, group_size: int | None) -> int:
    """Columns per group of a layer's weight: `group_size` if it is set. Otherwise 64 for 8 bits (with 32, scales are
    a fifth of the arithmetic), and 32 for 4 bits or if 64 does not divide the columns."""
    if group_size is not None:
        return group_size
    return 64 if bits == 8 and columns % 64 == 0 else 32


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised weight [N, K]."""

    bits: int
    values: U8  # [N, groups, group_size * bits / 8]; 4 bits: low nibbles come first
    scales: Floats  # [N, groups] float16 or float32
    minima: Floats | None  # of the scales' shape and type; 4 bits only

    @property
    def num_bytes(self) -> int:
        """Of all its arrays."""
        return sum(array.nbytes for array in (self.values, self.scales, self.minima) if array is not None)

    def part(self, rows: slice) -> Quantised:
        """Some rows of it."""
        return Quantised(
            self.bits, self.values[rows], self.scales[rows], None if self.minima is None else self.minima[rows]
        )


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
    if bits == 4:
        groups = weight.reshape(len(weight), -1, group_size)
        low = groups.min(axis=2)
        scales, minima = rounded(nonzero((groups.max(axis=2) - low) / np.float32(15)), low)
        assert minima is not None
        return nearest(weight, scales, minima)
    groups = weight.reshape(len(weight), -1, group_size)
    scales, _ = rounded(nonzero(np.maximum(groups.max(axis=2), -groups.min(axis=2)) / np.float32(127)))
    return nearest(weight, scales, None)


def nearest(weight: F32, scales: Floats, minima: Floats | None) -> Quantised:
    """`weight` [N, K] rounded to the nearest values of its groups, whose scales and minima are rounded already; without minima
    to 8 bits. Some rows at a time: beside them, it needs a multiple of their memory."""
    count = max(1, _AT_ONCE // weight.shape[1])
    pieces = []
    for first in range(0, len(weight), count):
        rows = slice(first, first + count)
        groups = weight[rows].reshape(len(weight[rows]), scales.shape[1], -1)
        steps = groups if minima is None else groups - minima[rows].astype(np.float32)[:, :, None]
        steps = np.rint(steps / scales[rows].astype(np.float32)[:, :, None])
        if minima is None:
            pieces.append((np.clip(steps, -127, 127) + 128).astype(np.uint8))
        else:
            pieces.append(pack_nibbles(np.clip(steps, 0, 15).astype(np.uint8)))
    return Quantised(8 if minima is None else 4, np.concatenate(pieces), scales, minima)


def affine(values: U8, scales: F32, minima: F32) -> Quantised:
    """A 4-bit weight from values [N, groups, group_size] in 0…15 and its groups' scales and minima, which are rounded already."""
    stored, stored_minima = rounded(scales, minima)
    return Quantised(4, pack_nibbles(values), stored, stored_minima)


def rounded(scales: F32, minima: F32 | None = None) -> tuple[Floats, Floats | None]:
    """Scales and minima as they are stored: in 16 bits where the largest scale is a normal number of float16 and nothing
    overflows. A smaller scale loses digits then, of groups whose weights are nothing beside those of the others; it does not
    become 0."""
    largest = max(float(np.abs(x).max(initial=0)) for x in (scales, minima) if x is not None)
    if not float(scales.max(initial=0)) >= _NORMAL or largest > _LARGEST:
        return scales, minima
    halves = np.maximum(scales.astype(np.float16), np.float16(_SMALLEST))
    return halves, None if minima is None else minima.astype(np.float16)


def dequantise(quantised: Quantised) -> F32:
    """The weight [N, K] that the quantised one represents."""
    scales = quantised.scales.astype(np.float32)[:, :, None]
    if quantised.minima is None:
        groups = (quantised.values.astype(np.float32) - 128) * scales
    else:
        groups = unpack_nibbles(quantised.values) * scales + quantised.minima.astype(np.float32)[:, :, None]
    return np.asarray(groups.reshape(len(groups), -1), dtype=np.float32)


def nonzero(scales: F32) -> F32:
    """Scales of 0 belong to groups of equal values, for which each scale is right: they become the largest of the others, which
    changes nothing in how those are stored."""
    largest = scales.max(initial=0)
    return np.where(scales > 0, scales, largest if largest > 0 else np.float32(1)).astype(np.float32)


def pack_nibbles(values: U8) -> U8:
    """Pack two values per byte along the last axis, low nibble first."""
    return np.asarray(values[..., 0::2] | (values[..., 1::2] << 4))
