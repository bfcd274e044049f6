"""Decode attention over a paged KV cache, in Triton. A program has one row and the query heads of one KV head.

The positions that a row attends to are cut into at most `SEGMENTS` segments (flash decoding, Dao et al. 2023), whose
size depends only on how many positions these are. So a small batch fills a GPU, a result does not depend on the batch,
and one captured launch of a fixed size serves every length; the programs of segments that a short row does not have end
at once. A second kernel joins the segments, always in order. Each row is computed alone, also if a sequence has
several.

Per row it reads 2 · length · kv_heads · D values of the cache's dtype. Oracle: `kernels.oracle.eager`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..oracle.operands import PLAIN_SCORES, DecodeRows, LayerCache, Scores
from .launch import FLOATS, I32, check, dot, power_of_two, wide
from .rotary_write import CACHE_DTYPES

SPLIT = 128  # the fewest positions of a segment
SEGMENTS = 16  # the most segments of a row
TILE = 64  # positions that a program reads at once
LOG2E = 1.4426950408889634


@triton.jit
def load_cache(
    cache, scales, table, head, kv_heads, size, place, inside, column, BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr
):
    """Load the positions `place` of a block table: (tile [positions, columns] as stored, scales [positions] float32).

    Positions that are not `inside` are 0. They are not read, because the cache may have a NaN there, and 0 · NaN is
    NaN.
    """
    block = tl.load(table + place // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    line = (block * kv_heads + head) * BLOCK_SIZE + place % BLOCK_SIZE
    mask = inside[:, None] & (column < size)[None, :]
    tile = tl.load(cache + line[:, None] * size + column[None, :], mask=mask, other=0.0)
    scale = tl.full(place.shape, 1.0, tl.float32)
    if SCALED:
        scale = tl.load(scales + line, mask=inside, other=0.0)
    return tile, scale


@triton.jit
def scaled_scores(scores, k_scale, scale, cap, CAPPED: tl.constexpr):
    """Scores [queries, positions] in powers of 2. CAPPED: cap · tanh(scores / cap), `cap` in the same unit."""
    scores = scores * (k_scale * scale)[None, :]
    if CAPPED:  # tanh(x) = 1 − 2 / (exp(2 x) + 1)
        scores = cap - 2.0 * cap / (tl.exp2(scores * (2.8853900817779268 / cap)) + 1.0)
    return scores


@triton.jit
def _segments(length, window, SEGMENTS: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """The first position of a row's first segment, and the size of its segments, both multiples of TILE."""
    first = tl.maximum(length - window, 0) // TILE * TILE
    return first, tl.maximum(tl.cdiv(length - first, SEGMENTS * TILE) * TILE, SPLIT)


@triton.jit
def _decode_kernel(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    rows,
    seqs,
    lengths,
    tables,
    table_width,
    sums,
    maxima,
    totals,
    scale,
    cap,
    window,
    num_heads,
    kv_heads,
    num_splits,
    size,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One segment, row and KV head: the unnormalised output, the largest score, and the sum of exponentials."""
    item = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + item)
    start, extent = _segments(length, window, SEGMENTS, SPLIT, TILE)
    start += split * extent
    if start >= length:
        return
    unseen = tl.maximum(length - window, 0)
    row = tl.load(rows + item).to(tl.int64)
    table = tables + tl.load(seqs + item).to(tl.int64) * table_width
    member = tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    heads = head * GROUP + member
    mask = (member < GROUP)[:, None] & (column < size)[None, :]
    q = tl.load(query + (row * num_heads + heads)[:, None] * size + column[None, :], mask=mask, other=0.0)
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    out = tl.zeros((HEADS, COLUMNS), tl.float32)
    for first in range(start, tl.minimum(start + extent, length), TILE):
        place = first + tl.arange(0, TILE)
        inside = (place >= unseen) & (place < length)
        k, k_scale = load_cache(
            keys, key_scales, table, head, kv_heads, size, place, inside, column, BLOCK_SIZE, SCALED
        )
        scores = dot(q, tl.trans(k.to(q.dtype)), tl.zeros((HEADS, TILE), tl.float32), WIDE)
        scores = scaled_scores(scores, k_scale, scale, cap, CAPPED)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, axis=1)
        v, v_scale = load_cache(
            values, value_scales, table, head, kv_heads, size, place, inside, column, BLOCK_SIZE, SCALED
        )
        out = dot((p * v_scale[None, :]).to(q.dtype), v.to(q.dtype), out * shrink[:, None], WIDE)
        largest = new
    at = (item * num_heads + heads).to(tl.int64) * num_splits + split
    tl.store(sums + at[:, None] * size + column[None, :], out, mask=mask)
    tl.store(maxima + at, largest, mask=member < GROUP)
    tl.store(totals + at, total, mask=member < GROUP)


@triton.jit
def _join_kernel(
    sums,
    maxima,
    totals,
    rows,
    lengths,
    out,
    window,
    num_heads,
    num_splits,
    size,
    SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Join the segments of one row and head, in order, into its output."""
    item = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    inside = column < size
    first = (item * num_heads + head).to(tl.int64) * num_splits
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    result = tl.zeros((COLUMNS,), tl.float32)
    length = tl.load(lengths + item)
    start, extent = _segments(length, window, SEGMENTS, SPLIT, TILE)
    for split in range(tl.cdiv(length - start, extent)):
        at = first + split
        part_max = tl.load(maxima + at)
        new = tl.maximum(largest, part_max)
        shrink = tl.exp2(largest - new)
        weight = tl.exp2(part_max - new)
        total = total * shrink + tl.load(totals + at) * weight
        result = result * shrink + tl.load(sums + at * size + column, mask=inside, other=0.0) * weight
        largest = new
    result = tl.where(total > 0.0, result / total, 0.0)
    result = tl.where(total == total, result, total)  # keep a NaN
    row = tl.load(rows + item).to(tl.int64)
    tl.store(out + (row * num_heads + head) * size + column, result.to(out.dtype.element_ty), mask=inside)


def num_segments(max_length: int) -> int:
    """How many segments a row has at most, if it attends to at most `max_length` positions."""
    return min(SEGMENTS, int(triton.cdiv(max_length, SPLIT)))


def check_attention(query: torch.Tensor, cache: LayerCache, tables: torch.Tensor, out: torch.Tensor) -> int:
    """The number of query heads per KV head. Raises `ValueError` for an operand of the wrong shape, dtype, device or
    layout."""
    kv_heads, _, size = cache.keys.shape[1:]
    check("query", query, (-1, -1, size), FLOATS, query)
    check("keys", cache.keys, (-1, kv_heads, -1, size), CACHE_DTYPES, query)
    check("values", cache.values, cache.keys.shape, (cache.keys.dtype,), query)
    check("tables", tables, (-1, -1), I32, query)
    check("out", out, query.shape, (query.dtype,), query)
    if query.shape[1] % kv_heads:
        raise ValueError(f"{kv_heads} key/value heads do not divide {query.shape[1]} query heads")
    return query.shape[1] // kv_heads


def decode_attention(
    query: torch.Tensor, cache: LayerCache, rows: DecodeRows, out: torch.Tensor, scores: Scores = PLAIN_SCORES
) -> None:
    """out[r] = attention of query[r] over its sequence's first positions, for each row r of `rows`. Other rows stay as
    they are.

    query, out [rows, heads, D]; with a window, only the last of a row's positions; what lies before them is not
    read. Raises `ValueError` for an operand of the wrong shape, dtype, device or layout. The caller
    must check the contents of the block tables; reading them here would synchronise.
    """
    group = check_attention(query, cache, rows.tables, out)
    count = len(rows.rows)
    for name, tensor in (("rows", rows.rows), ("seqs", rows.seqs), ("lengths", rows.lengths)):
        check(name, tensor, (count,), I32, query)
    if not count:
        return
    num_heads, size = query.shape[1:]
    kv_heads, num_splits = num_heads // group, num_segments(rows.max_length)
    shape = (count, num_heads, num_splits)
    sums = torch.empty(*shape, size, dtype=torch.float32, device=query.device)
    maxima, totals = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2))
    window = rows.max_length if scores.window is None else scores.window
    scaled = cache.key_scales is not None
    segments = {"SEGMENTS": SEGMENTS, "SPLIT": SPLIT, "TILE": TILE}
    _decode_kernel[(count, kv_heads, num_splits)](
        *(query, cache.keys, cache.values),
        *((cache.key_scales, cache.value_scales) if scaled else (cache.keys, cache.values)),
        *(rows.rows, rows.seqs, rows.lengths, rows.tables, rows.tables.shape[1]),
        *(
            sums,
            maxima,
            totals,
            scores.scale_for(size) * LOG2E,
            LOG2E * (scores.softcap or 0.0),
            window,
            num_heads,
            kv_heads,
            num_splits,
            size,
        ),
        GROUP=group,
        BLOCK_SIZE=cache.block_size,
        SCALED=scaled,
        CAPPED=scores.softcap is not None,
        **segments,
        HEADS=power_of_two(group, 16),
        COLUMNS=power_of_two(size, 16),
        WIDE=wide(),
        num_warps=4,
        num_stages=3,
    )
    _join_kernel[(count, num_heads)](
        *(sums, maxima, totals, rows.rows, rows.lengths, out, window, num_heads, num_splits, size),
        **segments,
        COLUMNS=power_of_two(size),
        num_warps=1,
    )
