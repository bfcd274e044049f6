"""Prefill attention over a paged KV cache, in Triton: causal attention of chunks of rows to the chunk and all positions before.

The chunk's own keys and values must be in the cache. A tile has some rows of the chunk and all query heads of one KV head, so
keys and values are read once for them. The softmax is online (FlashAttention-2, Dao 2023). The result of a tile depends only on
its chunk. Multiply-accumulates: 2 · heads · D · Σ positions attended to. Oracle: `kernels.oracle.eager`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..oracle.operands import PLAIN_SCORES, LayerCache, PrefillChunks, Scores
from .launch import I32, INTERPRETED, check, dot, power_of_two, wide
from .paged_attention import LOG2E, check_attention, load_cache, scaled_scores


@triton.jit
def _prefill_kernel(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    starts,
    sizes,
    lengths,
    seqs,
    tables,
    table_width,
    out,
    scale,
    cap,
    window,
    num_heads,
    kv_heads,
    size,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    first_row = tl.program_id(2) * ROWS
    count = tl.load(sizes + chunk)
    if first_row >= count:
        return
    length = tl.load(lengths + chunk)
    table = tables + tl.load(seqs + chunk).to(tl.int64) * table_width
    lane = tl.arange(0, ROWS * HEADS)  # the heads of a row are neighbours
    row = first_row + lane // HEADS
    member = lane % HEADS
    column = tl.arange(0, COLUMNS)
    here = (row < count) & (member < GROUP)
    flat = (tl.load(starts + chunk) + row).to(tl.int64) * num_heads + head * GROUP + member
    mask = here[:, None] & (column < size)[None, :]
    q = tl.load(query + flat[:, None] * size + column[None, :], mask=mask, other=0.0)
    position = length - count + row
    largest = tl.full(
        (ROWS * HEADS,), -1.0e30, tl.float32
    )  # finite, so that a lane without a visible position yet makes no NaN
    total = tl.zeros((ROWS * HEADS,), tl.float32)
    result = tl.zeros((ROWS * HEADS, COLUMNS), tl.float32)
    end = tl.minimum(length, length - count + first_row + ROWS)
    unseen = tl.maximum(length - count + first_row + 1 - window, 0)  # by any row of the tile
    for first in range(unseen // TILE * TILE, end, TILE):
        place = first + tl.arange(0, TILE)
        inside = place < end
        k, k_scale = load_cache(
            keys, key_scales, table, head, kv_heads, size, place, inside, column, BLOCK_SIZE, SCALED
        )
        scores = dot(q, tl.trans(k.to(q.dtype)), tl.zeros((ROWS * HEADS, TILE), tl.float32), WIDE)
        seen = inside[None, :] & (place[None, :] <= position[:, None]) & (place[None, :] > position[:, None] - window)
        scores = tl.where(seen, scaled_scores(scores, k_scale, scale, cap, CAPPED), float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, axis=1)
        v, v_scale = load_cache(
            values, value_scales, table, head, kv_heads, size, place, inside, column, BLOCK_SIZE, SCALED
        )
        result = dot((p * v_scale[None, :]).to(q.dtype), v.to(q.dtype), result * shrink[:, None], WIDE)
        largest = new
    result = result / total[:, None]
    tl.store(out + flat[:, None] * size + column[None, :], result.to(out.dtype.element_ty), mask=mask)


def prefill_attention(
    query: torch.Tensor, cache: LayerCache, chunks: PrefillChunks, out: torch.Tensor, scores: Scores = PLAIN_SCORES
) -> None:
    """out[r] = causal attention of query[r] over its sequence, for every row r of the chunks. Other rows stay as they are.

    query, out [rows, heads, D]; with a window, only the last positions up to a row's own.
    Raises `ValueError` for an operand of the wrong shape, dtype, device or layout.
    """
    group = check_attention(query, cache, chunks.tables, out)
    count = len(chunks.starts)
    for name, tensor in (
        ("starts", chunks.starts),
        ("sizes", chunks.sizes),
        ("lengths", chunks.lengths),
        ("seqs", chunks.seqs),
    ):
        check(name, tensor, (count,), I32, query)
    if not count:
        return
    num_heads, size = query.shape[1:]
    heads = power_of_two(group)
    # The interpreter is slow on large, mostly empty tiles; large heads need the shared memory for less of them.
    rows = max(1, (32 if INTERPRETED else 128 if size <= 128 else 64) // heads)
    window = chunks.tables.shape[1] * cache.block_size if scores.window is None else scores.window
    scaled = cache.key_scales is not None
    _prefill_kernel[(count, num_heads // group, triton.cdiv(chunks.max_size, rows))](
        *(query, cache.keys, cache.values),
        *((cache.key_scales, cache.value_scales) if scaled else (cache.keys, cache.values)),
        *(chunks.starts, chunks.sizes, chunks.lengths, chunks.seqs, chunks.tables, chunks.tables.shape[1]),
        *(
            out,
            scores.scale_for(size) * LOG2E,
            LOG2E * (scores.softcap or 0.0),
            window,
            num_heads,
            num_heads // group,
            size,
        ),
        GROUP=group,
        BLOCK_SIZE=cache.block_size,
        SCALED=scaled,
        CAPPED=scores.softcap is not None,
        ROWS=rows,
        TILE=64,
        HEADS=heads,
        COLUMNS=power_of_two(size, 16),
        WIDE=wide(),
        num_warps=8,
        num_stages=3 if size <= 128 else 2,
    )
