"""Low-rank adapters per row, in Triton: y[r] += B[d] (A[d] x[r]), where d is the adapter of row r.

All rows of a tile have the same adapter (`operands.AdapterTiles`). So an adapter's A and B are read once per tile, and
both products run on the tensor cores (as in S-LoRA and Punica, 2023). K is cut into parts of a fixed size, so that a
few rows are not the work of a few programs; the second kernel adds the parts, in order. The programs of empty tiles end
at once, so one captured launch serves all assignments of rows. Bytes: A and B of each tile's adapter. Oracle:
`kernels.oracle.eager`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..oracle.operands import ADAPTER_TILE, AdapterTiles, AdapterWeight
from .launch import FLOATS, I32, check, dot, power_of_two, wide

BLOCK_K = 128
BLOCK_N = 128
SPLIT_K = 1024  # columns of A per program


@triton.jit
def _shrink_kernel(
    x,
    a,
    order,
    adapters,
    inner,
    num_k,
    rank,
    places,
    TILE: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """inner[split, place, :] = A[d] x[row] over one part of K, for the rows of one tile."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    adapter = tl.load(adapters + tile).to(tl.int64)
    if adapter < 0:
        return
    place = tile * TILE + tl.arange(0, TILE)
    row = tl.load(order + place).to(tl.int64)
    r = tl.arange(0, RANK)
    acc = tl.zeros((TILE, RANK), tl.float32)
    for k0 in range(split * SPLIT_K, tl.minimum(split * SPLIT_K + SPLIT_K, num_k), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        rows = tl.load(
            x + row[:, None] * num_k + k[None, :], mask=(row >= 0)[:, None] & (k < num_k)[None, :], other=0.0
        )
        mask = (k < num_k)[:, None] & (r < rank)[None, :]
        w = tl.load(a + (adapter * rank + r)[None, :] * num_k + k[:, None], mask=mask, other=0.0)
        acc = dot(rows, w.to(rows.dtype), acc, WIDE)
    tl.store(inner + (split * places + place[:, None]) * RANK + r[None, :], acc)


@triton.jit
def _expand_kernel(
    inner,
    b,
    order,
    adapters,
    out,
    num_n,
    rank,
    places,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[row, n] += B[d] Σ inner[:, place] for the rows of one tile."""
    tile = tl.program_id(0)
    adapter = tl.load(adapters + tile).to(tl.int64)
    if adapter < 0:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tile * TILE + tl.arange(0, TILE)
    row = tl.load(order + place).to(tl.int64)
    r = tl.arange(0, RANK)
    at = place[:, None] * RANK + r[None, :]
    shrunk = tl.load(inner + at)
    for split in tl.static_range(1, SPLITS):
        shrunk += tl.load(inner + split * places * RANK + at)
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
    splits, places = triton.cdiv(num_k, SPLIT_K), num_tiles * ADAPTER_TILE
    inner = torch.empty(splits, places, padded, dtype=torch.float32, device=x.device)
    sizes = {"TILE": ADAPTER_TILE, "RANK": padded, "WIDE": wide()}
    _shrink_kernel[(num_tiles, splits)](
        *(x, weight.a, tiles.order, tiles.adapters, inner, num_k, rank, places),
        **sizes,
        SPLIT_K=SPLIT_K,
        BLOCK_K=BLOCK_K,
        num_stages=4,
    )
    _expand_kernel[(num_tiles, triton.cdiv(num_n, BLOCK_N))](
        *(inner, weight.b, tiles.order, tiles.adapters, parts[0], num_n, rank, places),
        SPLITS=splits,
        **sizes,
        BLOCK_N=BLOCK_N,
    )
