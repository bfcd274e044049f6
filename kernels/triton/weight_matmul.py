"""y = x Wᵀ, in Triton, with W dense, or quantised to 8 or 4 bits in groups. Activations are not quantised.

There are two paths, by the number of rows M:

    M ≤ 64   bound by the bandwidth of the weights. The *weights* are the large side of a tensor core tile, the rows the small
             one. If N alone does not fill a GPU, K is split over programs. The parts of the splits, [splits, M, N] float32, are
             not added here: the kernel that reads them next adds them, in order, which saves a launch.
    M > 64   bound by the tensor cores. Quantised weights are dequantised tile by tile.

Splits and tiles depend only on N and K, not on M or the device. So within a path, a row's result does not depend on its
batch. That is why a dense W has a kernel here too: the vendor's matmul chooses its tiles, and so the order of its sums,
by M. The paths agree up to rounding. Bytes: W once, x and y. Oracle: `kernels.oracle.eager`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..oracle.operands import LinearWeight
from .launch import FLOATS, check, dot, power_of_two, wide

SMALL = 64
PROGRAMS = 256  # K is split until there are so many: about two per multiprocessor of a large GPU
BLOCK_N = 64
BLOCK_K = 128


@triton.jit
def weight_tile(
    values,
    scales,
    minima,
    n,
    k0,
    num_n,
    num_k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W[n, k0 … k0 + BLOCK_K - 1], [BLOCK_N, BLOCK_K]: dequantised to float32, or as stored if W is dense. Outside W it
    is 0, because of the scales and minima: whatever byte stands for q there is finite."""
    rows = n.to(tl.int64)[:, None]
    real = (n < num_n)[:, None]
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    if BITS == 0:
        w = tl.load(values + rows * num_k + k, mask=real & (k < num_k), other=0.0)
    else:
        if BITS == 8:
            q = tl.load(values + rows * num_k + k, mask=real & (k < num_k)).to(tl.float32) - 128.0
        else:
            pair = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            pairs = tl.load(values + rows * (num_k // 2) + pair, mask=real & (pair < num_k // 2))
            q = tl.reshape(tl.join(pairs & 15, pairs >> 4), (BLOCK_N, BLOCK_K)).to(tl.float32)
        groups = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)
        at = groups.to(tl.int64)[:, None] * num_n + n[None, :]
        mask = (groups < num_k // GROUP)[:, None] & (n < num_n)[None, :]
        grouped = tl.reshape(q, (BLOCK_N, BLOCK_K // GROUP, GROUP))
        grouped *= tl.trans(tl.load(scales + at, mask=mask, other=0.0)).to(tl.float32)[:, :, None]
        if BITS == 4:
            grouped += tl.trans(tl.load(minima + at, mask=mask, other=0.0)).to(tl.float32)[:, :, None]
        w = tl.reshape(grouped, (BLOCK_N, BLOCK_K))
    return w


@triton.jit
def _small_kernel(
    x,
    values,
    scales,
    minima,
    bias,
    parts,
    num_m,
    num_n,
    num_k,
    split_k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """parts[split, :, n] for BLOCK_N outputs n: Σ W tile [BLOCK_N, BLOCK_K] · xᵀ tile [BLOCK_K, BLOCK_M]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(split * split_k, tl.minimum(split * split_k + split_k, num_k), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = (k < num_k)[:, None] & (m < num_m)[None, :]
        rows = tl.load(x + m[None, :] * num_k + k[:, None], mask=mask, other=0.0)
        w = weight_tile(values, scales, minima, n, k0, num_n, num_k, BITS, GROUP, BLOCK_N, BLOCK_K)
        acc = dot(w.to(rows.dtype), rows, acc, WIDE)
    if BIAS and split == 0:
        acc += tl.load(bias + n, mask=n < num_n, other=0.0)[:, None]
    at = (split * num_m + m)[None, :].to(tl.int64) * num_n + n[:, None]
    tl.store(parts + at, acc, mask=(n < num_n)[:, None] & (m < num_m)[None, :])


@triton.jit
def _large_kernel(
    x,
    values,
    scales,
    minima,
    bias,
    out,
    num_m,
    num_n,
    num_k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of x Wᵀ. Programs with the same weight tile are neighbours, so that it is read from memory once."""
    tiles_m = tl.cdiv(num_m, BLOCK_M)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, num_k, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = (m < num_m)[:, None] & (k < num_k)[None, :]
        rows = tl.load(x + m.to(tl.int64)[:, None] * num_k + k[None, :], mask=mask, other=0.0)
        w = weight_tile(values, scales, minima, n, k0, num_n, num_k, BITS, GROUP, BLOCK_N, BLOCK_K)
        acc = dot(rows, tl.trans(w.to(rows.dtype)), acc, WIDE)
    if BIAS:
        acc += tl.load(bias + n, mask=n < num_n, other=0.0)[None, :]
    at = m.to(tl.int64)[:, None] * num_n + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(m < num_m)[:, None] & (n < num_n)[None, :])


def num_splits(n: int, k: int) -> int:
    """The number of parts of K for M ≤ 64. It is doubled, up to 8, until there are `PROGRAMS` programs or a part would
    have less than four tiles."""
    splits = 1
    while splits < 8 and triton.cdiv(n, BLOCK_N) * splits < PROGRAMS and k >= splits * 8 * BLOCK_K:
        splits *= 2
    return splits


def check_weight(x: torch.Tensor, weight: LinearWeight) -> None:
    """Raise `ValueError` unless x [M, K] and the weight fit each other in shape, dtype, device and layout."""
    n, k = weight.shape
    check("x", x, (-1, k), FLOATS, x)
    if weight.scales is None:
        check("values", weight.values, (n, k), (x.dtype,), x)
    else:
        check("values", weight.values, (n, k if weight.bits == 8 else k // 2), (torch.uint8,), x)
        for name, tensor in (("scales", weight.scales), ("minima", weight.minima)):
            if tensor is not None:
                check(name, tensor, (len(weight.scales), n), FLOATS, x)
        if k % len(weight.scales) or weight.group_size not in (16, 32, 64, 128):
            raise ValueError(
                f"{len(weight.scales)} groups over {k} columns: a group must have 16, 32, 64 or 128 columns, and divide K"
            )
    if weight.bias is not None:
        check("bias", weight.bias, (n,), (torch.float32,), x)


def operands(weight: LinearWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """values, scales, minima, bias. `values` stands for a tensor that the weight does not have; the kernel does not
    read it."""
    values = weight.values
    others = (weight.scales, weight.minima, weight.bias)
    return (values, *(values if tensor is None else tensor for tensor in others))  # type: ignore[return-value]


def matmul(x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
    """Parts [splits, M, N] whose sum is x Wᵀ + bias: float32 for M ≤ 64, else one part in x's dtype.

    x [M, K] float32, bfloat16 or float16, contiguous. Raises `ValueError` for an operand of the wrong shape, dtype,
    device or layout.
    """
    check_weight(x, weight)
    num_m, (n, k) = len(x), weight.shape
    flags = {"BITS": weight.bits, "GROUP": weight.group_size, "BIAS": weight.bias is not None, "WIDE": wide()}
    if num_m <= SMALL:
        splits = num_splits(n, k)
        parts = torch.empty(splits, num_m, n, dtype=torch.float32, device=x.device)
        if num_m:
            split_k = triton.cdiv(triton.cdiv(k, BLOCK_K), splits) * BLOCK_K
            _small_kernel[(triton.cdiv(n, BLOCK_N), splits)](
                *(x, *operands(weight), parts, num_m, n, k, split_k),
                **flags,
                BLOCK_M=power_of_two(num_m, 16),
                BLOCK_N=BLOCK_N,
                # 128 bytes of a dense row, so that more programs are resident.
                BLOCK_K=BLOCK_K if weight.bits else BLOCK_K // 2,
                num_warps=4,
                num_stages=4,
            )
        return parts
    out = torch.empty(1, num_m, n, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(num_m, 128) * triton.cdiv(n, 128),)
    _large_kernel[grid](
        *(x, *operands(weight), out, num_m, n, k),
        **flags,
        BLOCK_M=128,
        BLOCK_N=128,
        BLOCK_K=max(64, weight.group_size),
        num_warps=8,
        num_stages=3,
    )
    return out
