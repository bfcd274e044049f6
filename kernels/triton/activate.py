"""Fused activation, in Triton: partial sums of the gate and up projections → silu(gate) · up or gelu(gate) · up, or a GELU of the
up projection.

Per row it reads splits · 2 I float32 values and writes I. Oracle: `kernels.oracle.eager`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import FLOATS, check

BLOCK = 1024
ACTIVATIONS = ("swiglu", "geglu", "gelu", "gelu_erf")


@triton.jit
def _gelu(x):  # x / 2 · (1 + tanh(inner)) = x · sigmoid(2 inner)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def _activate_kernel(
    parts,
    out,
    rows,
    size,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    width = 2 * size if GATED else size
    up = tl.zeros((BLOCK,), tl.float32)
    gate = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        first = parts + (split * rows + row) * width
        if GATED:
            gate += tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
            first += size
        up += tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    if EXACT:
        y = 0.5 * up * (1.0 + tl.erf(0.7071067811865476 * up))
    elif not GATED:
        y = _gelu(up)
    elif GELU:
        y = _gelu(gate) * up
    else:
        y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + at, y.to(out.dtype.element_ty), mask=inside)


def activate(parts: torch.Tensor, activation: str, dtype: torch.dtype) -> torch.Tensor:
    """Sum the parts and activate: [rows, I] in `dtype`.

    "swiglu", "geglu": parts [splits, rows, 2 I], gate first → silu(gate) · up or gelu(gate) · up (Shazeer 2020). "gelu",
    "gelu_erf": parts [splits, rows, I]. gelu is the tanh approximation, gelu_erf is exact (Hendrycks and Gimpel 2016). Raises
    `ValueError` for an operand of the wrong shape, dtype, device or layout, or another activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"the activation is {activation!r}; known are {ACTIVATIONS}")
    gated = activation in ("swiglu", "geglu")
    splits, rows, width = parts.shape
    check("parts", parts, (splits, rows, width), FLOATS, parts)
    if gated and width % 2:
        raise ValueError(f"gate and up must have the same width, but parts have the odd width {width}")
    size = width // 2 if gated else width
    out = torch.empty(rows, size, dtype=dtype, device=parts.device)
    if rows:
        grid = (rows, triton.cdiv(size, BLOCK))
        gelu = activation != "swiglu"
        exact = activation == "gelu_erf"
        _activate_kernel[grid](parts, out, rows, size, SPLITS=splits, GATED=gated, GELU=gelu, EXACT=exact, BLOCK=BLOCK)
    return out
