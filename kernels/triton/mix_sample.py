"""Fused mix + sample, in Triton: from the members' logits to one token and its log-probability per request.

The oracle is `kernels.oracle.reference`, whose random words are the same. The mixed logits are never written to
memory: each pass mixes a tile of the vocabulary in registers and reduces it.

    logits space, no truncation    1 pass over the logits
    probs space                    1 more, for each row's log-sum-exp
    top-k, top-p                   8 more each: the cut is found exactly, one hexadecimal digit of the float per pass
    any truncation                 1 more, for the largest mixed logit

The vocabulary is cut into splits of a fixed size, so that a small batch fills a GPU and a result does not depend on
the batch. A second, small kernel joins the splits. Penalties, biases and forbidden tokens are not handled here: the
caller edits the rows before.

It runs on an NVIDIA GPU, and on a CPU through Triton's interpreter (TRITON_INTERPRET=1), as the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..oracle.operands import Draw, Mixture
from .draw import LARGEST_GUMBEL, LARGEST_INT32, LEAST_INT32, gumbel, join_parts

SPLIT = 8192  # tokens of the vocabulary per program
TILE = 1024
CUT_TILE = 512  # tile of the pass that compares with 16 thresholds at once


@triton.jit
def _mixed_tile(logits_ptr, stride, lse_ptr, rows_ptr, coefficients_ptr, start, end, is_probs, offsets, inside):
    """Mixed logits of a tile [TILE], -inf outside the vocabulary."""
    total = tl.zeros(offsets.shape, tl.float32)
    for term in range(start, end):
        row = tl.load(rows_ptr + term)
        coefficient = tl.load(coefficients_ptr + term)
        z = tl.load(logits_ptr + row.to(tl.int64) * stride + offsets, mask=inside, other=0.0).to(tl.float32)
        if is_probs != 0:
            total += coefficient * tl.exp(z - tl.load(lse_ptr + row))
        else:
            total += tl.where(coefficient == 0.0, 0.0, coefficient * z)
    if is_probs != 0:
        total = tl.log(total)
    return tl.where(inside, total, float("-inf"))


@triton.jit
def _split_lse_kernel(
    logits_ptr, stride, part_max_ptr, part_sum_ptr, vocab, num_splits, SPLIT: tl.constexpr, TILE: tl.constexpr
):
    """Largest logit and sum of exponentials of one split of one row, in one pass."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocab), TILE):
        offsets = first + tl.arange(0, TILE)
        z = tl.load(logits_ptr + row.to(tl.int64) * stride + offsets, mask=offsets < vocab, other=float("-inf")).to(
            tl.float32
        )
        new = tl.maximum(largest, tl.max(z, axis=0))
        if new > float("-inf"):
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new), axis=0)
            largest = new
    tl.store(part_max_ptr + row * num_splits + split, largest)
    tl.store(part_sum_ptr + row * num_splits + split, total)


@triton.jit
def _row_lse_kernel(part_max_ptr, part_sum_ptr, lse_ptr, num_splits, SPLITS: tl.constexpr):
    """Join the splits of one row into its log-sum-exp."""
    row = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    at = row * num_splits + splits
    maxima = tl.load(part_max_ptr + at, mask=splits < num_splits, other=float("-inf"))
    sums = tl.load(part_sum_ptr + at, mask=splits < num_splits, other=0.0)
    largest = tl.max(maxima, axis=0)
    tl.store(lse_ptr + row, largest + tl.log(tl.sum(sums * tl.exp(maxima - largest), axis=0)))


@triton.jit
def _order(z):
    """The place of a float32 in the order of floats: an int32 that grows with z."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ LARGEST_INT32, bits)


@triton.jit
def _thresholds(low, digit):
    """The 16 thresholds [16] of one digit; the first is `low`."""
    return (low.to(tl.int64) + (tl.arange(0, 16).to(tl.int64) << (28 - 4 * digit))).to(tl.int32)


@triton.jit
def _cut_kernel(
    logits_ptr,
    stride,
    lse_ptr,
    starts_ptr,
    rows_ptr,
    coefficients_ptr,
    is_probs_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    cuts_ptr,
    vocab,
    TILE: tl.constexpr,
):
    """The place (see `_order`) of the least mixed logit that truncation keeps; the lowest int32 if nothing is cut."""
    request = tl.program_id(0)
    start = tl.load(starts_ptr + request)
    end = tl.load(starts_ptr + request + 1)
    is_probs = tl.load(is_probs_ptr + request)
    temperature = tl.load(temperature_ptr + request)
    top_k = tl.load(top_k_ptr + request)
    top_p = tl.load(top_p_ptr + request)
    min_p = tl.load(min_p_ptr + request)
    cut = tl.full((), LEAST_INT32, tl.int32)
    if temperature > 0.0 and (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
        largest = tl.full((), float("-inf"), tl.float32)
        for first in range(0, vocab, TILE):
            offsets = first + tl.arange(0, TILE)
            z = _mixed_tile(
                logits_ptr, stride, lse_ptr, rows_ptr, coefficients_ptr, start, end, is_probs, offsets, offsets < vocab
            )
            largest = tl.maximum(largest, tl.max(z, axis=0))
        if (top_k > 0) & (top_k < vocab):
            low = tl.full((), LEAST_INT32, tl.int32)  # keeps at least top_k tokens
            for digit in range(8):
                thresholds = _thresholds(low, digit)
                counts = tl.zeros((16,), tl.int32)
                for first in range(0, vocab, TILE):
                    offsets = first + tl.arange(0, TILE)
                    inside = offsets < vocab
                    z = _mixed_tile(
                        logits_ptr, stride, lse_ptr, rows_ptr, coefficients_ptr, start, end, is_probs, offsets, inside
                    )
                    above = inside[:, None] & (_order(z)[:, None] >= thresholds[None, :])
                    counts += tl.sum(above.to(tl.int32), axis=0)
                low = tl.max(tl.where(counts >= top_k, thresholds, low), axis=0)
            cut = low
        if top_p < 1.0:
            low = tl.full((), LEAST_INT32, tl.int32)  # keeps at least the share top_p of the mass above the cut
            share = tl.full((), 0.0, tl.float32)
            for digit in range(8):
                thresholds = _thresholds(low, digit)
                masses = tl.zeros((16,), tl.float32)
                for first in range(0, vocab, TILE):
                    offsets = first + tl.arange(0, TILE)
                    inside = offsets < vocab
                    z = _mixed_tile(
                        logits_ptr, stride, lse_ptr, rows_ptr, coefficients_ptr, start, end, is_probs, offsets, inside
                    )
                    place = _order(z)
                    mass = tl.where(place >= cut, tl.exp((z - largest) / temperature), 0.0)
                    masses += tl.sum(tl.where(place[:, None] >= thresholds[None, :], mass[:, None], 0.0), axis=0)
                if digit == 0:
                    share = top_p * tl.max(masses, axis=0)
                low = tl.max(tl.where(masses >= share, thresholds, low), axis=0)
            cut = tl.maximum(cut, low)
        if min_p > 0.0:
            cut = tl.maximum(cut, _order(largest + temperature * tl.log(min_p)))
    tl.store(cuts_ptr + request, cut)


@triton.jit
def _partial_kernel(
    logits_ptr,
    stride,
    lse_ptr,
    starts_ptr,
    rows_ptr,
    coefficients_ptr,
    is_probs_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    cuts_ptr,
    part_max_ptr,
    part_sum_ptr,
    part_score_ptr,
    part_logit_ptr,
    part_token_ptr,
    vocab,
    num_splits,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One split of one request's vocabulary: largest mixed logit, sum of exponentials, and the best token so far."""
    request = tl.program_id(0)
    split = tl.program_id(1)
    start = tl.load(starts_ptr + request)
    end = tl.load(starts_ptr + request + 1)
    is_probs = tl.load(is_probs_ptr + request)
    temperature = tl.load(temperature_ptr + request)
    seed = tl.load(seeds_ptr + request)
    position = tl.load(positions_ptr + request)
    cut = tl.load(cuts_ptr + request)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    best_score = tl.full((), float("-inf"), tl.float32)
    best_logit = tl.full((), float("-inf"), tl.float32)
    best_token = tl.full((), LARGEST_INT32, tl.int32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocab), TILE):
        offsets = first + tl.arange(0, TILE)
        inside = offsets < vocab
        z = _mixed_tile(logits_ptr, stride, lse_ptr, rows_ptr, coefficients_ptr, start, end, is_probs, offsets, inside)
        number = tl.where(z == z, z, float("-inf"))
        tile_max = tl.max(number, axis=0)
        new = tl.maximum(largest, tile_max)
        total = total * tl.where(new > float("-inf"), tl.exp(largest - new), 1.0)
        total += tl.sum(tl.exp(z - tl.where(new > float("-inf"), new, 0.0)), axis=0)
        largest = new
        kept = inside & (_order(z) >= cut)
        tile_best = tl.full((), float("-inf"), tl.float32)
        score = tl.where(kept, number, float("-inf"))
        if temperature > 0.0:
            # Noise is bounded. If even the largest could not make the best of this tile win, none is drawn.
            if tile_max / temperature + LARGEST_GUMBEL > best_score:
                score = tl.where(kept, number / temperature + gumbel(offsets, position, seed), float("-inf"))
                tile_best = tl.max(score, axis=0)
        else:
            tile_best = tl.max(score, axis=0)
        if tile_best > best_score:
            winner = tl.min(tl.where(score == tile_best, offsets, LARGEST_INT32), axis=0)
            best_score = tile_best
            best_token = winner
            best_logit = tl.max(tl.where(offsets == winner, number, float("-inf")), axis=0)
    at = request * num_splits + split
    tl.store(part_max_ptr + at, largest)
    tl.store(part_sum_ptr + at, total)
    tl.store(part_score_ptr + at, best_score)
    tl.store(part_logit_ptr + at, best_logit)
    tl.store(part_token_ptr + at, best_token)


def mix_sample(logits: torch.Tensor, mixture: Mixture, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per request.

    logits [R, vocab] float32, bfloat16 or float16, rows contiguous. Returns token ids [B] int32 (-1 if a logit is NaN
    or +inf, or no token is left) and the tokens' log-probabilities [B] float32 under the mixed distribution, before
    temperature and truncation. Raises `ValueError` for wrong shapes, dtypes, devices or strides.
    """
    num_requests = _check(logits, mixture, draw)
    device, (num_rows, vocab) = logits.device, logits.shape
    num_splits = triton.cdiv(vocab, SPLIT)
    splits = {"SPLIT": SPLIT, "TILE": TILE}
    cuts = torch.empty(num_requests, dtype=torch.int32, device=device)
    parts = [torch.empty(num_requests, num_splits, dtype=torch.float32, device=device) for _ in range(4)]
    part_tokens = torch.empty(num_requests, num_splits, dtype=torch.int32, device=device)
    lse = torch.empty(num_rows if mixture.any_probs else 0, dtype=torch.float32, device=device)
    rows = (logits, logits.stride(0), lse)
    mix = (mixture.starts, mixture.rows, mixture.coefficients, mixture.is_probs)
    # Requests that do not need a pass skip it inside the kernel, because the host reads no values.
    if mixture.any_probs and num_rows:
        maxima, sums = (torch.empty(num_rows, num_splits, dtype=torch.float32, device=device) for _ in range(2))
        _split_lse_kernel[(num_rows, num_splits)](logits, logits.stride(0), maxima, sums, vocab, num_splits, **splits)
        _row_lse_kernel[(num_rows,)](maxima, sums, lse, num_splits, SPLITS=triton.next_power_of_2(num_splits))
    if draw.any_cut and num_requests:
        _cut_kernel[(num_requests,)](
            *rows, *mix, draw.temperature, draw.top_k, draw.top_p, draw.min_p, cuts, vocab, TILE=CUT_TILE, num_warps=8
        )
    else:
        cuts.fill_(LEAST_INT32.value)
    if num_requests:
        _partial_kernel[(num_requests, num_splits)](
            *rows,
            *mix,
            draw.temperature,
            draw.seeds,
            draw.positions,
            cuts,
            *parts,
            part_tokens,
            vocab,
            num_splits,
            **splits,
        )
    return join_parts(parts, part_tokens)


def _check(logits: torch.Tensor, mixture: Mixture, draw: Draw) -> int:
    if logits.ndim != 2 or logits.stride(1) != 1 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [R, vocab] with contiguous rows, got {tuple(logits.shape)}")
    count = len(mixture.starts) - 1
    wanted = {
        "starts": (mixture.starts, torch.int32, count + 1),
        "rows": (mixture.rows, torch.int32, len(mixture.rows)),
        "coefficients": (mixture.coefficients, torch.float32, len(mixture.rows)),
        "is_probs": (mixture.is_probs, torch.int32, count),
        "temperature": (draw.temperature, torch.float32, count),
        "top_k": (draw.top_k, torch.int32, count),
        "top_p": (draw.top_p, torch.float32, count),
        "min_p": (draw.min_p, torch.float32, count),
        "seeds": (draw.seeds, torch.int64, count),
        "positions": (draw.positions, torch.int32, count),
    }
    for name, (tensor, dtype, size) in wanted.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != (size,) or tensor.device != logits.device:
            raise ValueError(
                f"{name} must be [{size}] {dtype} on {logits.device}, "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    return count
