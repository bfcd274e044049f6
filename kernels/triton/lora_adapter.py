"""Low-rank adapters per row, in Triton: y[r] += B[d] (A[d] x[r]), where d is the adapter of row r.

All rows of a tile have the same adapter (`operands.AdapterTiles`). So an adapter's A and B are read once per tile, and both
products run on the tensor cores (as in S-LoRA and Punica, 2023). The programs of empty tiles end at once, so one captured
launch serves all assignments of rows. Bytes: A and B of each tile's adapter. Oracle: `kernels.oracle.eager`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..oracle.operands import ADAPTER_TILE, AdapterTiles, AdapterWeight
from .launch import FLOATS, I32, check, dot, power_of_two, wide

BLOCK_K = 128
BLOCK_N = 128


@triton.jit
def _shrink_kernel(
    x,
    a,
    order,
    adapters,
    inner,
    num_k,
    rank,
    TILE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """inner[place, :] = A[d] x[row] for the rows of one tile."""
    tile = tl.program_id(0)
    adapter = tl.load(adapters + tile).to(tl.int64)
    if adapter < 0:
        return
    place = tile * TILE + tl.arange(0, TILE)
    row = tl.load(order + place).to(tl.int64)
    r = tl.arange(0, RANK)
    acc = tl.zeros((TILE, RANK), tl.float32)
    for k0 in range(0, num_k, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        rows = tl.load(
            x + row[:, None] * num_k + k[None, :], mask=(row >= 0)[:, None] & (k < num_k)[None, :], other=0.0
        )
        mask = (k < num_k)[:, None] & (r < rank)[None, :]
        w = tl.load(a + (adapter * rank + r)[None, :] * num_k + k[:, None], mask=mask, other=0.0)
        acc = dot(rows, w.to(rows.dtype), acc, WIDE)
    tl.store(inner + place[:, None] * RANK + r[None, :], acc)


@triton.jit
def _expand_kernel(
    inner,
    b,
    order,
    adapters,
    out,
    num_n,
    rank,
    TILE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[row, n] += B[d] inner[place] for the rows of one tile."""
    tile = tl.program_id(0)
    adapter = tl.load(adapters + tile).to(tl.int64)
    if adapter < 0:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tile * TILE + tl.arange(0, TILE)
    row = tl.load(order + place).to(tl.int64)
    r = tl.arange(0, RANK)
    shrunk = tl.load(inner + place[:, None] * RANK + r[None, :])
    mask = (r < rank)[:, None] & (n < num_n)[None, :]
    w = tl.load(b + (adapter * num_n + n)[None, :] * rank + r[:, None], mask=mask, other=0.0)
    acc = dot(shrunk.to(w.dtype), w, tl.zeros((TILE, BLOCK_N), tl.float32), WIDE)
    at = row[:, None] * num_n + n[None, :]
    mask = (row >= 0)[:, None] & (n < num_n)[None, :]
    acc += tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


def add_adapter(x: torch.Tensor, weight: AdapterWeight, tiles: AdapterTiles, parts: torch.Tensor) -> None:
    """parts[0, r] += B[d] (A[d] x[r]), in place, for every row r of the tiles; d is the row's adapter.

    x [rows, K]; parts [splits, rows, N], as `matmul` returns them; the weight has x's dtype. Raises `ValueError` for an
    operand of the wrong shape, dtype, device or layout.
    """
    rows, num_k = x.shape
    count, rank, _ = weight.a.shape
    num_n, num_tiles = weight.b.shape[1], len(tiles.adapters)
    check("x", x, (rows, num_k), FLOATS, x)
    check("a", weight.a, (count, rank, num_k), (x.dtype,), x)
    check("b", weight.b, (count, num_n, rank), (x.dtype,), x)
    check("order", tiles.order, (num_tiles * ADAPTER_TILE,), I32, x)
    check("adapters", tiles.adapters, (num_tiles,), I32, x)
    check("parts", parts, (-1, rows, num_n), FLOATS, x)
    if not num_tiles:
        return
    padded = power_of_two(rank, 16)
    inner = torch.empty(num_tiles * ADAPTER_TILE, padded, dtype=torch.float32, device=x.device)
    sizes = {"TILE": ADAPTER_TILE, "RANK": padded, "WIDE": wide()}
    _shrink_kernel[(num_tiles,)](
        x, weight.a, tiles.order, tiles.adapters, inner, num_k, rank, **sizes, BLOCK_K=BLOCK_K, num_stages=4
    )
    _expand_kernel[(num_tiles, triton.cdiv(num_n, BLOCK_N))](
        inner, weight.b, tiles.order, tiles.adapters, parts[0], num_n, rank, **sizes, BLOCK_N=BLOCK_N
    )
