"""The draw, shared by `mix_sample` and `mix_head_sample`: noise, the best token of a tile, and joining partial results.

A vocabulary is cut into parts. For each part a kernel keeps the largest mixed logit, the sum of exponentials, and the
token with the best score; `join_parts` turns them into one token and its log-probability. The random words are those
of the oracle (`kernels.oracle.reference`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST_GUMBEL = tl.constexpr(16.7)  # −log(−log(1 − 2⁻²⁴)), rounded up
LEAST_INT32 = tl.constexpr(-(2**31))
LARGEST_INT32 = tl.constexpr(2**31 - 1)
UNIFORM_STEP = tl.constexpr(2.0**-23)  # distance between two uniforms


@triton.jit
def gumbel(token, position, seed):
    """The noise of token ids under (seed, position): the first word of Philox4x32-10, see `kernels.oracle.reference`."""
    shape = token + position
    zero = (shape * 0).to(tl.uint32)
    c0 = zero + token.to(tl.uint32)
    c1 = zero + position.to(tl.uint32)
    word, _, _, _ = tl.philox(seed, c0, c1, zero, zero)
    uniform = ((word >> 9).to(tl.float32) + 0.5) * UNIFORM_STEP
    return -tl.log(-tl.log(uniform))


@triton.jit
def best_of_tile(z, token, inside, temperature, seed, position):
    """For each of M requests (temperature, seed, position [M]), from mixed logits z [T, M] of token ids [T, 1]: the
    largest logit, the sum of exponentials (NaN if a logit is NaN), the best score, and its logit and token, each
    [M]."""
    z = tl.where(inside, z, float("-inf"))
    number = tl.where(z == z, z, float("-inf"))
    largest = tl.max(number, axis=0)
    total = tl.sum(tl.exp(z - tl.where(largest > float("-inf"), largest, 0.0)[None, :]), axis=0)
    noisy = (temperature > 0.0)[None, :]
    noise = gumbel(token, position[None, :], seed[None, :])
    score = tl.where(noisy, number / tl.where(noisy, temperature[None, :], 1.0) + noise, number)
    score = tl.where(inside, score, float("-inf"))
    best = tl.max(score, axis=0)
    winner = tl.min(tl.where(score == best[None, :], token, LARGEST_INT32), axis=0)
    logit = tl.max(tl.where(token == winner[None, :], number, float("-inf")), axis=0)
    return largest, total, best, logit, winner


@triton.jit
def _join_kernel(
    part_max_ptr,
    part_sum_ptr,
    part_score_ptr,
    part_logit_ptr,
    part_token_ptr,
    tokens_ptr,
    logprobs_ptr,
    num_splits,
    SPLITS: tl.constexpr,
):
    """Join the splits of one request into its token and log-probability. Ties take the lowest id. The token is -1 if
    a logit is NaN or +inf, or if no token is left."""
    request = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    inside = splits < num_splits
    at = request.to(tl.int64) * num_splits + splits
    maxima = tl.load(part_max_ptr + at, mask=inside, other=float("-inf"))
    sums = tl.load(part_sum_ptr + at, mask=inside, other=0.0)
    scores = tl.load(part_score_ptr + at, mask=inside, other=float("-inf"))
    logits = tl.load(part_logit_ptr + at, mask=inside, other=float("-inf"))
    candidates = tl.load(part_token_ptr + at, mask=inside, other=LARGEST_INT32)
    largest = tl.max(maxima, axis=0)
    best = tl.max(scores, axis=0)
    weights = tl.where(maxima > float("-inf"), tl.exp(maxima - largest), 1.0)  # 1 keeps a sum that is NaN
    total = tl.sum(sums * weights, axis=0)
    lse = largest + tl.log(total)
    token = tl.min(tl.where(inside & (scores == best), candidates, LARGEST_INT32), axis=0)
    chosen = tl.max(tl.where(inside & (candidates == token), logits, float("-inf")), axis=0)
    found = (total == total) & (largest < float("inf")) & (best > float("-inf"))
    tl.store(tokens_ptr + request, tl.where(found, token, -1))
    tl.store(logprobs_ptr + request, tl.where(found, chosen - lse, float("nan")))


def join_parts(parts: list[torch.Tensor], part_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From the four partial results [B, splits] (see `best_of_tile`) and tokens [B, splits] to tokens and
    log-probabilities [B]."""
    count, num_splits = part_tokens.shape
    tokens = torch.empty(count, dtype=torch.int32, device=part_tokens.device)
    logprobs = torch.empty(count, dtype=torch.float32, device=part_tokens.device)
    if count:
        splits = triton.next_power_of_2(num_splits)
        _join_kernel[(count,)](*parts, part_tokens, tokens, logprobs, num_splits, SPLITS=splits)
    return tokens, logprobs
