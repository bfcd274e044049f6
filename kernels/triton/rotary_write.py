"""Fused head norm, rotary embedding and KV write, in Triton.

It makes rotated queries from the partial sums of the qkv projection, and writes keys and values to their slots, quantised if
the cache is. There is one program per row and head. Per row it reads splits · (heads + 2 kv_heads) · D float32 values and
writes the queries, keys and values. Oracle: `kernels.oracle.eager`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..oracle.operands import LayerCache
from .launch import F32, FLOATS, I32, check, power_of_two

CACHE_DTYPES = (*FLOATS, torch.int8, torch.float8_e4m3fn)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def _store_head(
    x, cache, scales, slot, head, kv_heads, size, at, inside, BLOCK_SIZE: tl.constexpr, LARGEST: tl.constexpr
):
    """Write one head [size] of one position: x if LARGEST is 0, else x / scale with scale = max|x| / LARGEST."""
    block = slot // BLOCK_SIZE
    place = (block * kv_heads + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    if LARGEST > 0:
        scale = tl.maximum(tl.max(tl.abs(x), axis=0) / LARGEST, 1e-30)
        tl.store(scales + place, scale)
        x = x / scale
        if cache.dtype.element_ty == tl.int8:
            x = tl.floor(x + 0.5)
    tl.store(cache + place * size + at, x.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def _rotary_write_kernel(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    positions,
    slots,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    rows,
    num_heads,
    kv_heads,
    size,
    turned,
    eps,
    SPLITS: tl.constexpr,
    ROTARY: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)  # queries, then keys, then values
    half = size // 2
    at = tl.arange(0, HALF)
    inside = at < half
    # Channel i < turned is paired with turned + i, which the rotation combines; the channels behind them are split in two.
    one = tl.where(at < turned, at, turned + at)
    two = tl.where(at < turned, turned + at, half + at)
    width = (num_heads + 2 * kv_heads) * size
    first = tl.zeros((HALF,), tl.float32)
    second = tl.zeros((HALF,), tl.float32)
    for split in tl.static_range(SPLITS):
        start = qkv + (split * rows + row) * width + head * size
        first += tl.load(start + one, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(start + two, mask=inside, other=0.0).to(tl.float32)
    is_key = (head >= num_heads) & (head < num_heads + kv_heads)
    if head < num_heads + kv_heads:
        if NORM:
            weight = k_norm if is_key else q_norm
            scale = 1.0 / tl.sqrt(tl.sum(first * first + second * second, axis=0) / size + eps)
            first = first * scale * tl.load(weight + one, mask=inside, other=0.0).to(tl.float32)
            second = second * scale * tl.load(weight + two, mask=inside, other=0.0).to(tl.float32)
        if ROTARY:
            place = tl.load(positions + row).to(tl.int64) * turned
            cosine = tl.load(cos + place + at, mask=at < turned, other=1.0)
            sine = tl.load(sin + place + at, mask=at < turned, other=0.0)
            rotated = first * cosine - second * sine
            second = second * cosine + first * sine
            first = rotated
    both = tl.arange(0, 2 * HALF)  # HALF is a power of two, half may not be
    x = tl.reshape(tl.permute(tl.join(first, second), (1, 0)), (2 * HALF,))
    column = both % HALF
    turns = column < turned
    front, back = tl.where(turns, column, turned + column), tl.where(turns, turned + column, half + column)
    offsets = tl.where(both < HALF, front, back)
    valid = column < half
    if head < num_heads:
        target = query + (row * num_heads + head) * size
        tl.store(target + offsets, x.to(query.dtype.element_ty), mask=valid)
    else:
        slot = tl.load(slots + row).to(tl.int64)
        if is_key:
            _store_head(
                x, keys, key_scales, slot, head - num_heads, kv_heads, size, offsets, valid, BLOCK_SIZE, LARGEST
            )
        else:
            kv_head = head - num_heads - kv_heads
            _store_head(x, values, value_scales, slot, kv_head, kv_heads, size, offsets, valid, BLOCK_SIZE, LARGEST)


def rotary_write(
    qkv: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cache: LayerCache,
    num_heads: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Queries [rows, heads, D] in `dtype`, after norm and rotation. Keys and values are written to the cache.

    qkv [splits, rows, (heads + 2 kv_heads) · D]. tables: cos and sin [positions, r / 2] float32, or None for no rotation; the
    first r ≤ D channels rotate, i with i + r / 2, as in Hugging Face's layout. norms: weights [D] of the RMS norms of query and
    key heads, or None. positions, slots: [rows] int32, slot = block · block_size + offset. Raises `ValueError` for an operand of
    the wrong shape, dtype, device or layout.
    """
    splits, rows, _ = qkv.shape
    kv_heads, block_size, size = cache.keys.shape[1:]
    _check(qkv, tables, norms, positions, slots, cache, num_heads)
    query = torch.empty(rows, num_heads, size, dtype=dtype, device=qkv.device)
    scales = cache.keys if cache.key_scales is None else cache.key_scales
    value_scales = cache.values if cache.value_scales is None else cache.value_scales
    cos, sin = tables or (qkv, qkv)
    turned = size // 2 if tables is None else tables[0].shape[1]
    q_norm, k_norm = norms or (qkv, qkv)
    if rows:
        _rotary_write_kernel[(rows, num_heads + 2 * kv_heads)](
            *(qkv, cos, sin, q_norm, k_norm, positions, slots, query),
            *(cache.keys, cache.values, scales, value_scales),
            *(rows, num_heads, kv_heads, size, turned, eps),
            SPLITS=splits,
            ROTARY=tables is not None,
            NORM=norms is not None,
            BLOCK_SIZE=block_size,
            LARGEST=LARGEST.get(cache.keys.dtype, 0.0),
            HALF=power_of_two(size // 2),
            num_warps=1,
        )
    return query


def _check(
    qkv: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cache: LayerCache,
    num_heads: int,
) -> None:
    kv_heads, _, size = cache.keys.shape[1:]
    rows = qkv.shape[1]
    if size % 2:
        raise ValueError(f"the head size must be even, got {size}")
    check("qkv", qkv, (-1, rows, (num_heads + 2 * kv_heads) * size), FLOATS, qkv)
    check("keys", cache.keys, (-1, kv_heads, -1, size), CACHE_DTYPES, qkv)
    check("values", cache.values, cache.keys.shape, (cache.keys.dtype,), qkv)
    check("positions", positions, (rows,), I32, qkv)
    check("slots", slots, (rows,), I32, qkv)
    turned = min(tables[0].shape[-1], size // 2) if tables else 0
    for name, table in zip(("cos", "sin"), tables or ()):
        check(name, table, (-1, turned), F32, qkv)
    for name, weight in zip(("q_norm", "k_norm"), norms or ()):
        check(name, weight, (size,), FLOATS, qkv)
    for name, scale in (("key_scales", cache.key_scales), ("value_scales", cache.value_scales)):
        if (scale is None) != (cache.keys.dtype not in LARGEST):
            raise ValueError(f"a {cache.keys.dtype} cache {'lacks its' if scale is None else 'has no'} {name}")
        if scale is not None:
            check(name, scale, cache.keys.shape[:3], F32, qkv)
