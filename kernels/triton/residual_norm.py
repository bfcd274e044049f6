"""Fused residual and norm, in Triton: add the branch's partial sums to the residual stream and normalise it in one pass.

Bytes per row: branch (splits · H · 4), residual read and written (8 H), weight, and output. Oracle: `kernels.oracle.eager`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import F32, FLOATS, check, power_of_two


@triton.jit
def _residual_norm_kernel(
    branch, residual, weight, bias, out, rows, size, eps, SPLITS: tl.constexpr, LAYER: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(residual + row * size + at, mask=inside, other=0.0)
    for split in tl.static_range(SPLITS):
        x += tl.load(branch + (split * rows + row) * size + at, mask=inside, other=0.0).to(tl.float32)
    if SPLITS > 0:
        tl.store(residual + row * size + at, x, mask=inside)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if LAYER:
        x = tl.where(inside, x - tl.sum(x, axis=0) / size, 0.0)
    y = x / tl.sqrt(tl.sum(x * x, axis=0) / size + eps) * w
    if LAYER:
        y += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + at, y.to(out.dtype.element_ty), mask=inside)


def residual_norm(
    branch: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """residual += Σ branch, in place. Returns the norm of the residual, [rows, H] in `dtype`.

    branch [splits, rows, H] floating point, or None; residual [rows, H] float32; weight [H]. With bias [H] it is a layer norm,
    without one an RMS norm (Zhang & Sennrich 2019). Raises `ValueError` for an operand of the wrong shape, dtype, device or
    layout.
    """
    rows, size = residual.shape
    check("residual", residual, (rows, size), F32, residual)
    check("weight", weight, (size,), FLOATS, residual)
    if branch is not None:
        check("branch", branch, (-1, rows, size), FLOATS, residual)
    if bias is not None:
        check("bias", bias, (size,), FLOATS, residual)
    out = torch.empty(rows, size, dtype=dtype, device=residual.device)
    if rows:
        block = power_of_two(size)
        _residual_norm_kernel[(rows,)](
            residual if branch is None else branch,
            residual,
            weight,
            weight if bias is None else bias,
            out,
            rows,
            size,
            eps,
            SPLITS=0 if branch is None else len(branch),
            LAYER=bias is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return out
