"""Fused mix + head + sample, in Triton: from normed hidden states to tokens, with no logits in device memory.

For requests in logits space without truncation that need only the token and its log-probability:

    1. `mix_rows`     Σ wᵢ·hᵢ of each request, float32
    2. one tile of the vocabulary per program: head tile · mixed rows in registers, reduced to the largest logit,
       the sum of exponentials, and the Gumbel-max winner (after fused-head sampling, "FlashSampling", 2026)
    3. the tiles are joined by the same kernel as in `mix_sample`

The mix goes into the head as two rows of the weights' dtype, its rounding and the remainder, so rounding a mix to
bfloat16 costs no precision. A single member with coefficient 1 has no remainder and the same result as alone. Bytes
read: the head once per 64 requests. Oracle: `kernels.oracle.eager` (the same composition) and
`kernels.oracle.reference` (mix, sample).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..oracle.operands import Draw, LinearWeight, Mixture
from .draw import best_of_tile, join_parts
from .launch import F32, FLOATS, I32, check, dot, power_of_two, wide
from .weight_matmul import BLOCK_K, BLOCK_N, SMALL, check_weight, operands, weight_tile

KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _mix_rows_kernel(hidden, starts, rows, coefficients, mixed, size, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for term in range(tl.load(starts + request), tl.load(starts + request + 1)):
        coefficient = tl.load(coefficients + term)
        row = tl.load(rows + term).to(tl.int64)
        x = tl.load(hidden + row * size + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(coefficient == 0.0, 0.0, coefficient * x)  # a member with coefficient 0 may hold NaN
    tl.store(mixed + request.to(tl.int64) * size + at, total, mask=inside)


def mix_rows(hidden: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """Σ coefficient · hidden[row] of each request, [B, H] float32; hidden [R, H]. Raises `ValueError` for wrong
    shapes, dtypes or devices."""
    rows, size = hidden.shape
    count = len(mixture.starts) - 1
    check("hidden", hidden, (rows, size), FLOATS, hidden)
    check("starts", mixture.starts, (count + 1,), I32, hidden)
    check("rows", mixture.rows, (-1,), I32, hidden)
    check("coefficients", mixture.coefficients, mixture.rows.shape, F32, hidden)
    mixed = torch.empty(count, size, dtype=torch.float32, device=hidden.device)
    if count:
        grid = (count, triton.cdiv(size, 1024))
        _mix_rows_kernel[grid](
            hidden, mixture.starts, mixture.rows, mixture.coefficients, mixed, size, BLOCK=min(1024, power_of_two(size))
        )
    return mixed


@triton.jit
def _head_kernel(
    mixed,
    values,
    scales,
    minima,
    temperature,
    seeds,
    positions,
    part_max,
    part_sum,
    part_score,
    part_logit,
    part_token,
    num_m,
    num_n,
    num_k,
    num_tiles,
    KIND: tl.constexpr,
    ROUNDED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of the vocabulary for BLOCK_M requests."""
    tile = tl.program_id(0)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(0, num_k, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = (k < num_k)[:, None] & (m < num_m)[None, :]
        rows = tl.load(mixed + m[None, :].to(tl.int64) * num_k + k[:, None], mask=mask, other=0.0)
        w = weight_tile(values, scales, minima, n, k0, num_n, num_k, BITS, GROUP, BLOCK_N, BLOCK_K)
        coarse = rows.to(KIND)
        acc = dot(w.to(KIND), coarse, acc, WIDE)
        if ROUNDED:
            acc = dot(w.to(KIND), (rows - coarse.to(tl.float32)).to(KIND), acc, WIDE)
    largest, total, score, logit, token = best_of_tile(
        acc,
        n[:, None],
        (n < num_n)[:, None] & (m < num_m)[None, :],
        tl.load(temperature + m, mask=m < num_m, other=0.0),
        tl.load(seeds + m, mask=m < num_m, other=0),
        tl.load(positions + m, mask=m < num_m, other=0),
    )
    at = m.to(tl.int64) * num_tiles + tile
    here = m < num_m
    tl.store(part_max + at, largest, mask=here)
    tl.store(part_sum + at, total, mask=here)
    tl.store(part_score + at, score, mask=here)
    tl.store(part_logit + at, logit, mask=here)
    tl.store(part_token + at, token, mask=here)


def mix_head_sample(
    hidden: torch.Tensor, head: LinearWeight, mixture: Mixture, draw: Draw
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per request: tokens [B] int32 (-1: NaN, or no token is left) and log-probabilities [B] float32.

    hidden [R, H], normed, of the head's dtype where it is dense; head [vocab, H]. Every request is in logits space and
    untruncated: `mixture.any_probs` and `draw.any_cut` are False. Raises `ValueError` for arguments with other
    shapes, dtypes or devices, and for these two.
    """
    check_weight(hidden, head)
    if mixture.any_probs or draw.any_cut:
        raise ValueError("the fused head mixes logits and truncates nothing; use mix_sample")
    mixed = mix_rows(hidden, mixture)
    count, (vocab, size) = len(mixed), head.shape
    for name, tensor, dtype in (
        ("temperature", draw.temperature, torch.float32),
        ("seeds", draw.seeds, torch.int64),
        ("positions", draw.positions, torch.int32),
    ):
        check(name, tensor, (count,), (dtype,), hidden)
    num_tiles = triton.cdiv(vocab, BLOCK_N)
    parts = [torch.empty(count, num_tiles, dtype=torch.float32, device=hidden.device) for _ in range(4)]
    part_tokens = torch.empty(count, num_tiles, dtype=torch.int32, device=hidden.device)
    rows = min(SMALL, power_of_two(count, 16))
    if count:
        _head_kernel[(num_tiles, triton.cdiv(count, rows))](
            *(mixed, *operands(head)[:3], draw.temperature, draw.seeds, draw.positions, *parts, part_tokens),
            *(count, vocab, size, num_tiles),
            KIND=KINDS[hidden.dtype],
            ROUNDED=hidden.dtype is not torch.float32,
            BITS=head.bits,
            GROUP=head.group_size,
            BLOCK_M=rows,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K if head.bits else BLOCK_K // 2,
            WIDE=wide(),
            num_warps=4,
            num_stages=4,
        )
    return join_parts(parts, part_tokens)
