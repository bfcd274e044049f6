"""What all launchers share: checks of operands, and whether Triton interprets or compiles."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a · b in float32. WIDE is for the interpreter, which multiplies with numpy: in float64, because numpy has no
    bfloat16, and because its sums in float32 have an order that depends on the tile's size and on the CPU."""
    if WIDE:
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def wide() -> bool:
    """Whether `dot` must convert its operands first."""
    return INTERPRETED


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`. Triton's tiles have no other sizes."""
    return max(least, int(triton.next_power_of_2(size)))


def check(
    name: str, tensor: torch.Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], like: torch.Tensor
) -> None:
    """Raise `ValueError` unless `tensor` has this shape (-1: any size), one of the dtypes and the device of `like`, and is
    contiguous."""
    fits = tensor.ndim == len(shape) and all(want in (-1, found) for want, found in zip(shape, tensor.shape))
    if fits and tensor.dtype in dtypes and tensor.device == like.device and tensor.is_contiguous():
        return
    wanted = " or ".join(str(dtype) for dtype in dtypes)
    raise ValueError(
        f"{name} must be {list(shape)} {wanted} on {like.device}, contiguous; got {list(tensor.shape)} {tensor.dtype} on "
        f"{tensor.device}, strides {tensor.stride()}"
    )


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
I32 = (torch.int32,)
F32 = (torch.float32,)
