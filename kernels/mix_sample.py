"""Fused mix + sample, in Triton: from the members' logits to one token and its log-probability a request.

The oracle is `kernels.reference`; the draw is the same, word for word. The mixed logits are never written to memory: each
pass mixes a tile of the vocabulary in registers and reduces it.

    logits space, no truncation    1 pass over the logits
    probs space                    1 more, for each row's log-sum-exp
    top-k, top-p                   up to 33 more each: the cut is found by bisecting the order of floats, exactly
    min-p                          1 more, for the largest mixed logit

The vocabulary is cut into splits of a fixed size, so that a small batch fills a GPU and a result does not depend on the
batch; a second, small kernel joins the splits. Penalties, biases and forbidden tokens are not done here: they change few
logits, and a caller adds them to the rows before.

Runs on an NVIDIA GPU, and on the CPU through Triton's interpreter (TRITON_INTERPRET=1), which is how the tests run it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SPLIT = 8192  # tokens of the vocabulary a program
TILE = 1024


@dataclass(frozen=True, slots=True)
class Mixture:
    """A ragged mix of `B` requests in compressed rows: request b mixes rows `rows[starts[b]:starts[b + 1]]`.

    starts [B + 1] int32; rows [terms] int32; coefficients [terms] float32; is_probs [B] int32 (0: logits space).
    """

    starts: torch.Tensor
    rows: torch.Tensor
    coefficients: torch.Tensor
    is_probs: torch.Tensor


@dataclass(frozen=True, slots=True)
class Draw:
    """How to sample, one entry a request: temperature [B] float32 (0: greedy), top_k [B] int32 (0: off), top_p and min_p
    [B] float32 (1 and 0: off), seeds [B] int64 (the bits of the unsigned seed), positions [B] int32."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor


@triton.jit
def _mixed_tile(logits, stride, lse, rows, coefficients, start, end, is_probs, offsets, inside):
    """Mixed logits of a tile [TILE], -inf outside the vocabulary."""
    total = tl.zeros(offsets.shape, tl.float32)
    for term in range(start, end):
        row = tl.load(rows + term)
        coefficient = tl.load(coefficients + term)
        z = tl.load(logits + row.to(tl.int64) * stride + offsets, mask=inside, other=0.0).to(tl.float32)
        if is_probs != 0:
            total += coefficient * tl.exp(z - tl.load(lse + row))
        else:
            total += tl.where(coefficient == 0.0, 0.0, coefficient * z)
    if is_probs != 0:
        total = tl.log(total)
    return tl.where(inside, total, float("-inf"))


@triton.jit
def _row_lse_kernel(logits, stride, lse, vocab, TILE: tl.constexpr):
    """Log-sum-exp of one row of the logits, online."""
    row = tl.program_id(0)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, vocab, TILE):
        offsets = first + tl.arange(0, TILE)
        z = tl.load(logits + row.to(tl.int64) * stride + offsets, mask=offsets < vocab, other=float("-inf")).to(
            tl.float32
        )
        new = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new), axis=0)
        largest = new
    tl.store(lse + row, largest + tl.log(total))


@triton.jit
def _order(z):
    """A float's place in the order of floats: int64 in 0…2³²−1, growing with z."""
    bits = z.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def _cut_kernel(
    logits,
    stride,
    lse,
    starts,
    rows,
    coefficients,
    is_probs,
    temperature,
    top_k,
    top_p,
    min_p,
    cuts,
    vocab,
    TILE: tl.constexpr,
):
    """The place (see `_order`) of the least mixed logit that truncation keeps; 0 where nothing is cut."""
    request = tl.program_id(0)
    start = tl.load(starts + request)
    end = tl.load(starts + request + 1)
    probs = tl.load(is_probs + request)
    t = tl.load(temperature + request)
    k = tl.load(top_k + request)
    p = tl.load(top_p + request)
    least = tl.load(min_p + request)
    cut = tl.full((), 0, tl.int64)
    if t > 0.0 and (k > 0) | (p < 1.0) | (least > 0.0):
        largest = tl.full((), float("-inf"), tl.float32)
        for first in range(0, vocab, TILE):
            offsets = first + tl.arange(0, TILE)
            z = _mixed_tile(logits, stride, lse, rows, coefficients, start, end, probs, offsets, offsets < vocab)
            largest = tl.maximum(largest, tl.max(z, axis=0))
        if (k > 0) & (k < vocab):
            low = tl.full((), 0, tl.int64)  # keeps at least k
            high = tl.full((), 4294967296, tl.int64)  # keeps fewer
            for _ in range(32):
                middle = (low + high) // 2
                count = tl.full((), 0, tl.int32)
                for first in range(0, vocab, TILE):
                    offsets = first + tl.arange(0, TILE)
                    inside = offsets < vocab
                    z = _mixed_tile(logits, stride, lse, rows, coefficients, start, end, probs, offsets, inside)
                    count += tl.sum(tl.where(inside & (_order(z) >= middle), 1, 0), axis=0)
                low = tl.where(count >= k, middle, low)
                high = tl.where(count >= k, high, middle)
            cut = low
        if p < 1.0:
            total = tl.full((), 0.0, tl.float32)
            for first in range(0, vocab, TILE):
                offsets = first + tl.arange(0, TILE)
                inside = offsets < vocab
                z = _mixed_tile(logits, stride, lse, rows, coefficients, start, end, probs, offsets, inside)
                total += tl.sum(tl.where(_order(z) >= cut, tl.exp((z - largest) / t), 0.0), axis=0)
            low = cut  # keeps at least the share p
            high = tl.full((), 4294967296, tl.int64)
            for _ in range(32):
                middle = (low + high) // 2
                mass = tl.full((), 0.0, tl.float32)
                for first in range(0, vocab, TILE):
                    offsets = first + tl.arange(0, TILE)
                    inside = offsets < vocab
                    z = _mixed_tile(logits, stride, lse, rows, coefficients, start, end, probs, offsets, inside)
                    mass += tl.sum(tl.where(_order(z) >= middle, tl.exp((z - largest) / t), 0.0), axis=0)
                low = tl.where(mass >= p * total, middle, low)
                high = tl.where(mass >= p * total, high, middle)
            cut = low
        if least > 0.0:
            cut = tl.maximum(cut, _order(largest + t * tl.log(least)))
    tl.store(cuts + request, cut)


@triton.jit
def _partial_kernel(
    logits,
    stride,
    lse,
    starts,
    rows,
    coefficients,
    is_probs,
    temperature,
    seeds,
    positions,
    cuts,
    part_max,
    part_sum,
    part_score,
    part_logit,
    part_token,
    vocab,
    num_splits,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One split of one request's vocabulary: largest mixed logit, sum of exponentials, and the best token so far."""
    request = tl.program_id(0)
    split = tl.program_id(1)
    start = tl.load(starts + request)
    end = tl.load(starts + request + 1)
    probs = tl.load(is_probs + request)
    t = tl.load(temperature + request)
    seed = tl.load(seeds + request)
    position = tl.load(positions + request)
    cut = tl.load(cuts + request)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    best_score = tl.full((), float("-inf"), tl.float32)
    best_logit = tl.full((), float("-inf"), tl.float32)
    best_token = tl.full((), 0, tl.int32)
    for first in range(0, tl.minimum(SPLIT, vocab - split * SPLIT), TILE):
        offsets = split * SPLIT + first + tl.arange(0, TILE)
        inside = offsets < vocab
        z = _mixed_tile(logits, stride, lse, rows, coefficients, start, end, probs, offsets, inside)
        tile_max = tl.max(z, axis=0)
        new = tl.maximum(largest, tile_max)
        if new > float("-inf"):
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new), axis=0)
            largest = new
        score = z
        if t > 0.0:
            c0 = offsets.to(tl.uint32)
            c1 = (tl.zeros(offsets.shape, tl.int32) + position).to(tl.uint32)
            zero = tl.zeros(offsets.shape, tl.uint32)
            word, _, _, _ = tl.philox(seed, c0, c1, zero, zero)
            u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
            score = tl.where(inside & (_order(z) >= cut), z / t - tl.log(-tl.log(u)), float("-inf"))
        tile_best = tl.max(score, axis=0)
        if tile_best > best_score:
            winner = tl.min(tl.where(score == tile_best, offsets, 2147483647), axis=0)
            best_score = tile_best
            best_token = winner
            best_logit = tl.sum(tl.where(offsets == winner, z, 0.0), axis=0)
    at = request * num_splits + split
    tl.store(part_max + at, largest)
    tl.store(part_sum + at, total)
    tl.store(part_score + at, best_score)
    tl.store(part_logit + at, best_logit)
    tl.store(part_token + at, best_token)


@triton.jit
def _join_kernel(
    part_max, part_sum, part_score, part_logit, part_token, tokens, logprobs, num_splits, SPLITS: tl.constexpr
):
    """The splits of one request → its token and log-probability. Ties take the lowest id: the lowest split's."""
    request = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    inside = splits < num_splits
    at = request * num_splits + splits
    maxima = tl.load(part_max + at, mask=inside, other=float("-inf"))
    sums = tl.load(part_sum + at, mask=inside, other=0.0)
    scores = tl.load(part_score + at, mask=inside, other=float("-inf"))
    logits = tl.load(part_logit + at, mask=inside, other=0.0)
    candidates = tl.load(part_token + at, mask=inside, other=2147483647)
    largest = tl.max(maxima, axis=0)
    weights = tl.where(maxima > float("-inf"), tl.exp(maxima - largest), 0.0)
    lse = largest + tl.log(tl.sum(sums * weights, axis=0))
    token = tl.min(tl.where(inside & (scores == tl.max(scores, axis=0)), candidates, 2147483647), axis=0)
    chosen = tl.sum(tl.where(inside & (candidates == token), logits, 0.0), axis=0)
    tl.store(tokens + request, token)
    tl.store(logprobs + request, chosen - lse)


def mix_sample(logits: torch.Tensor, mixture: Mixture, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a request.

    logits [R, vocab] float32, bfloat16 or float16, rows contiguous. Returns token ids [B] int32 and the tokens'
    log-probabilities under the mixed distribution (before temperature and truncation) [B] float32. Raises `ValueError`
    for shapes, dtypes, devices or strides that do not fit.
    """
    num_requests = _check(logits, mixture, draw)
    device, vocab = logits.device, logits.shape[1]
    num_splits = triton.cdiv(vocab, SPLIT)
    lse = torch.zeros(len(logits), dtype=torch.float32, device=device)
    cuts = torch.zeros(num_requests, dtype=torch.int64, device=device)
    tokens = torch.empty(num_requests, dtype=torch.int32, device=device)
    logprobs = torch.empty(num_requests, dtype=torch.float32, device=device)
    parts = [torch.empty(num_requests, num_splits, dtype=torch.float32, device=device) for _ in range(4)]
    part_tokens = torch.empty(num_requests, num_splits, dtype=torch.int32, device=device)
    rows = (logits, logits.stride(0), lse)
    mix = (mixture.starts, mixture.rows, mixture.coefficients, mixture.is_probs)
    # The host does not look at the values (no synchronisation): requests that need no pass skip it inside.
    _row_lse_kernel[(len(logits),)](*rows, vocab, TILE=TILE)
    _cut_kernel[(num_requests,)](
        *rows, *mix, draw.temperature, draw.top_k, draw.top_p, draw.min_p, cuts, vocab, TILE=TILE
    )
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
        SPLIT=SPLIT,
        TILE=TILE,
    )
    _join_kernel[(num_requests,)](
        *parts, part_tokens, tokens, logprobs, num_splits, SPLITS=triton.next_power_of_2(num_splits)
    )
    return tokens, logprobs


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
