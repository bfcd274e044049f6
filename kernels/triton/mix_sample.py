"""Fused mix + sample, in Triton: from the members' logits to one token and its log-probability a request.

The oracle is `kernels.reference`; the draw is the same, word for word. The mixed logits are never written to memory: each
pass mixes a tile of the vocabulary in registers and reduces it.

    logits space, no truncation    1 pass over the logits
    probs space                    1 more, for each row's log-sum-exp
    top-k, top-p                   up to 9 more each: the cut is found digit by digit in the order of floats, exactly
    min-p                          1 more, for the largest mixed logit

The vocabulary is cut into splits of a fixed size, so that a small batch fills a GPU and a result does not depend on the
batch; a second, small kernel joins the splits. Penalties, biases and forbidden tokens are not done here: they change few
logits, and a caller adds them to the rows before.

Runs on an NVIDIA GPU, and on the CPU through Triton's interpreter (TRITON_INTERPRET=1), which is how the tests run it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..oracle.operands import Draw, Mixture

SPLIT = 8192  # tokens of the vocabulary a program
TILE = 1024
CUT_TILE = 512  # of the pass that counts under 16 thresholds at once
LARGEST_GUMBEL = tl.constexpr(16.7)  # −log(−log(1 − 2⁻²⁴)), rounded up


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
def _split_lse_kernel(logits, stride, part_max, part_sum, vocab, num_splits, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """Largest logit and sum of exponentials of one split of one row, online."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocab), TILE):
        offsets = first + tl.arange(0, TILE)
        z = tl.load(logits + row.to(tl.int64) * stride + offsets, mask=offsets < vocab, other=float("-inf")).to(
            tl.float32
        )
        new = tl.maximum(largest, tl.max(z, axis=0))
        if new > float("-inf"):
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new), axis=0)
            largest = new
    tl.store(part_max + row * num_splits + split, largest)
    tl.store(part_sum + row * num_splits + split, total)


@triton.jit
def _row_lse_kernel(part_max, part_sum, lse, num_splits, SPLITS: tl.constexpr):
    """The splits of one row → its log-sum-exp."""
    row = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    at = row * num_splits + splits
    maxima = tl.load(part_max + at, mask=splits < num_splits, other=float("-inf"))
    sums = tl.load(part_sum + at, mask=splits < num_splits, other=0.0)
    largest = tl.max(maxima, axis=0)
    tl.store(lse + row, largest + tl.log(tl.sum(sums * tl.exp(maxima - largest), axis=0)))


@triton.jit
def _order(z):
    """A float's place in the order of floats: int32, growing with z."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 2147483647, bits)


@triton.jit
def _thresholds(low, digit):
    """The 16 thresholds of one digit [16], of which the first is `low`."""
    return (low.to(tl.int64) + (tl.arange(0, 16).to(tl.int64) << (28 - 4 * digit))).to(tl.int32)


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
    """The place (see `_order`) of the least mixed logit that truncation keeps; the lowest int32 where nothing is cut."""
    request = tl.program_id(0)
    start = tl.load(starts + request)
    end = tl.load(starts + request + 1)
    probs = tl.load(is_probs + request)
    t = tl.load(temperature + request)
    k = tl.load(top_k + request)
    p = tl.load(top_p + request)
    least = tl.load(min_p + request)
    cut = tl.full((), -2147483648, tl.int32)
    if t > 0.0 and (k > 0) | (p < 1.0) | (least > 0.0):
        largest = tl.full((), float("-inf"), tl.float32)
        for first in range(0, vocab, TILE):
            offsets = first + tl.arange(0, TILE)
            z = _mixed_tile(logits, stride, lse, rows, coefficients, start, end, probs, offsets, offsets < vocab)
            largest = tl.maximum(largest, tl.max(z, axis=0))
        if (k > 0) & (k < vocab):
            low = tl.full((), -2147483648, tl.int32)  # keeps at least k
            for digit in range(8):
                thresholds = _thresholds(low, digit)
                counts = tl.zeros((16,), tl.int32)
                for first in range(0, vocab, TILE):
                    offsets = first + tl.arange(0, TILE)
                    inside = offsets < vocab
                    z = _mixed_tile(logits, stride, lse, rows, coefficients, start, end, probs, offsets, inside)
                    above = inside[:, None] & (_order(z)[:, None] >= thresholds[None, :])
                    counts += tl.sum(above.to(tl.int32), axis=0)
                low = tl.max(tl.where(counts >= k, thresholds, low), axis=0)
            cut = low
        if p < 1.0:
            low = tl.full((), -2147483648, tl.int32)  # keeps at least the share p of what is above the cut
            share = tl.full((), 0.0, tl.float32)
            for digit in range(8):
                thresholds = _thresholds(low, digit)
                masses = tl.zeros((16,), tl.float32)
                for first in range(0, vocab, TILE):
                    offsets = first + tl.arange(0, TILE)
                    inside = offsets < vocab
                    z = _mixed_tile(logits, stride, lse, rows, coefficients, start, end, probs, offsets, inside)
                    place = _order(z)
                    mass = tl.where(place >= cut, tl.exp((z - largest) / t), 0.0)
                    masses += tl.sum(tl.where(place[:, None] >= thresholds[None, :], mass[:, None], 0.0), axis=0)
                if digit == 0:
                    share = p * tl.max(masses, axis=0)
                low = tl.max(tl.where(masses >= share, thresholds, low), axis=0)
            cut = tl.maximum(cut, low)
        if least > 0.0:
            cut = tl.maximum(cut, _order(largest + t * tl.log(least)))
    tl.store(cuts + request, cut)


@triton.jit
def gumbel(token, position, seed):
    """The noise of token ids under (seed, position): the first word of Philox4x32-10, see `kernels.reference`."""
    shape = token + position
    zero = (shape * 0).to(tl.uint32)
    c0 = zero + token.to(tl.uint32)
    c1 = zero + position.to(tl.uint32)
    word, _, _, _ = tl.philox(seed, c0, c1, zero, zero)
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


@triton.jit
def best_of_tile(z, token, inside, temperature, seed, position):
    """Of mixed logits z [T, M], token ids [T, 1], for each of M requests (temperature, seed, position [M]): the largest
    logit, the sum of exponentials (NaN if any logit is), and the best score with its logit and token."""
    z = tl.where(inside, z, float("-inf"))
    number = tl.where(z == z, z, float("-inf"))
    largest = tl.max(number, axis=0)
    total = tl.sum(tl.exp(z - tl.where(largest > float("-inf"), largest, 0.0)[None, :]), axis=0)
    noisy = (temperature > 0.0)[None, :]
    noise = gumbel(token, position[None, :], seed[None, :])
    score = tl.where(noisy, number / tl.where(noisy, temperature[None, :], 1.0) + noise, number)
    score = tl.where(inside, score, float("-inf"))
    best = tl.max(score, axis=0)
    winner = tl.min(tl.where(score == best[None, :], token, 2147483647), axis=0)
    logit = tl.max(tl.where(token == winner[None, :], number, float("-inf")), axis=0)
    return largest, total, best, logit, winner


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
    best_token = tl.full((), 2147483647, tl.int32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocab), TILE):
        offsets = first + tl.arange(0, TILE)
        inside = offsets < vocab
        z = _mixed_tile(logits, stride, lse, rows, coefficients, start, end, probs, offsets, inside)
        number = tl.where(z == z, z, float("-inf"))
        tile_max = tl.max(number, axis=0)
        new = tl.maximum(largest, tile_max)
        total = total * tl.where(new > float("-inf"), tl.exp(largest - new), 1.0)
        total += tl.sum(tl.exp(z - tl.where(new > float("-inf"), new, 0.0)), axis=0)
        largest = new
        kept = inside & (_order(z) >= cut)
        tile_best = tl.full((), float("-inf"), tl.float32)
        score = tl.where(kept, number, float("-inf"))
        if t > 0.0:
            # Noise is bounded: where even the largest could not make a tile's best win, none is drawn.
            if tile_max / t + LARGEST_GUMBEL > best_score:
                score = tl.where(kept, number / t + gumbel(offsets, position, seed), float("-inf"))
                tile_best = tl.max(score, axis=0)
        else:
            tile_best = tl.max(score, axis=0)
        if tile_best > best_score:
            winner = tl.min(tl.where(score == tile_best, offsets, 2147483647), axis=0)
            best_score = tile_best
            best_token = winner
            best_logit = tl.max(tl.where(offsets == winner, number, float("-inf")), axis=0)
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
    """The splits of one request → its token and log-probability. Ties take the lowest id: the lowest split's. The token is
    -1 where a logit is NaN or +inf, or where none is left."""
    request = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    inside = splits < num_splits
    at = request.to(tl.int64) * num_splits + splits
    maxima = tl.load(part_max + at, mask=inside, other=float("-inf"))
    sums = tl.load(part_sum + at, mask=inside, other=0.0)
    scores = tl.load(part_score + at, mask=inside, other=float("-inf"))
    logits = tl.load(part_logit + at, mask=inside, other=float("-inf"))
    candidates = tl.load(part_token + at, mask=inside, other=2147483647)
    largest = tl.max(maxima, axis=0)
    best = tl.max(scores, axis=0)
    weights = tl.where(maxima > float("-inf"), tl.exp(maxima - largest), 1.0)  # 1: a sum that is NaN stays so
    total = tl.sum(sums * weights, axis=0)
    lse = largest + tl.log(total)
    token = tl.min(tl.where(inside & (scores == best), candidates, 2147483647), axis=0)
    chosen = tl.max(tl.where(inside & (candidates == token), logits, float("-inf")), axis=0)
    found = (total == total) & (largest < float("inf")) & (best > float("-inf"))
    tl.store(tokens + request, tl.where(found, token, -1))
    tl.store(logprobs + request, tl.where(found, chosen - lse, float("nan")))


def join_parts(parts: list[torch.Tensor], part_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The four partial results [B, splits] (see `best_of_tile`) and tokens [B, splits] → tokens and log-probabilities [B]."""
    count, num_splits = part_tokens.shape
    tokens = torch.empty(count, dtype=torch.int32, device=part_tokens.device)
    logprobs = torch.empty(count, dtype=torch.float32, device=part_tokens.device)
    if count:
        splits = triton.next_power_of_2(num_splits)
        _join_kernel[(count,)](*parts, part_tokens, tokens, logprobs, num_splits, SPLITS=splits)
    return tokens, logprobs


def mix_sample(logits: torch.Tensor, mixture: Mixture, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a request.

    logits [R, vocab] float32, bfloat16 or float16, rows contiguous. Returns token ids [B] int32 (-1: a logit is NaN or +inf,
    or none is left to choose) and the tokens' log-probabilities under the mixed distribution (before temperature and
    truncation) [B] float32. Raises `ValueError` for shapes, dtypes, devices or strides that do not fit.
    """
    num_requests = _check(logits, mixture, draw)
    device, (num_rows, vocab) = logits.device, logits.shape
    num_splits = triton.cdiv(vocab, SPLIT)
    splits = {"SPLIT": SPLIT, "TILE": TILE}
    cuts = torch.full((num_requests,), -(2**31), dtype=torch.int32, device=device)
    parts = [torch.empty(num_requests, num_splits, dtype=torch.float32, device=device) for _ in range(4)]
    part_tokens = torch.empty(num_requests, num_splits, dtype=torch.int32, device=device)
    lse = torch.empty(num_rows if mixture.any_probs else 0, dtype=torch.float32, device=device)
    rows = (logits, logits.stride(0), lse)
    mix = (mixture.starts, mixture.rows, mixture.coefficients, mixture.is_probs)
    # Where some requests need a pass and others do not, the latter skip it inside: nobody looks at values on the host.
    if mixture.any_probs and num_rows:
        maxima, sums = (torch.empty(num_rows, num_splits, dtype=torch.float32, device=device) for _ in range(2))
        _split_lse_kernel[(num_rows, num_splits)](logits, logits.stride(0), maxima, sums, vocab, num_splits, **splits)
        _row_lse_kernel[(num_rows,)](maxima, sums, lse, num_splits, SPLITS=triton.next_power_of_2(num_splits))
    if draw.any_cut and num_requests:
        _cut_kernel[(num_requests,)](
            *rows, *mix, draw.temperature, draw.top_k, draw.top_p, draw.min_p, cuts, vocab, TILE=CUT_TILE, num_warps=8
        )
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
