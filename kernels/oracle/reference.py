"""The plain oracle of mixing and sampling, in numpy. Slow, short, and the only one: tests and benches compare with it.

For one request: member logits z_m [members, vocab], coefficients c with Σ c = 1.

    mixed     logits space: Σ c_m z_m        probs space: log Σ c_m softmax(z_m)
    logprob   log_softmax(mixed)[token]
    adjusted  penalties and biases on `mixed`
    tempered  adjusted / temperature
    kept      top-k, then top-p, then min-p, each a threshold on `tempered`
    token     argmax over kept of tempered + gumbel;   temperature 0: argmax of adjusted;   ties: the lowest id

The draw is counter-based (Salmon et al. 2011): Philox4x32-10, key = the two words of the seed, counter = (token id,
position, 0, 0), first word x → u = ((x >> 9) + 0.5) · 2⁻²³, gumbel = −log(−log u). It depends on nothing but (seed,
position, token id): not on the batch, the vocabulary's order of visit, or the machine. 23 bits, because with the half they
fill the 24 of a float32: one bit more would round the largest u to 1, whose noise is infinite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(token_ids: I64, position: int, seed: int) -> U32:
    """First word of Philox4x32-10 at counter (token id, position, 0, 0) under the 64-bit key `seed`; [tokens]."""
    c0 = token_ids.astype(np.uint64) & _LOW
    c1 = np.full_like(c0, position & 0xFFFFFFFF)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return c0.astype(np.uint32)


def uniform(token_ids: I64, position: int, seed: int) -> F32:
    """[tokens] in (0, 1), odd multiples of 2⁻²⁴, exact in float32."""
    return ((philox4x32(token_ids, position, seed) >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(
        2.0**-23
    )


def gumbel(token_ids: I64, position: int, seed: int) -> F64:
    """[tokens] standard Gumbel variables."""
    return np.asarray(-np.log(-np.log(uniform(token_ids, position, seed).astype(np.float64))))


def log_softmax(logits: F64) -> F64:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def mix(logits: F32, coefficients: Sequence[float], space: str) -> F64:
    """Mixed logits [vocab] of member logits [members, vocab]. Members with coefficient 0 do not take part."""
    chosen = [(row.astype(np.float64), c) for row, c in zip(logits, coefficients, strict=True) if c != 0]
    if len(chosen) == 1 and chosen[0][1] == 1:
        return np.asarray(chosen[0][0])
    if space == "logits":
        return np.asarray(sum(c * row for row, c in chosen), dtype=np.float64)
    with np.errstate(divide="ignore"):  # a probability of 0 under every member is a mixed logit of -inf
        return np.asarray(np.log(sum(c * np.exp(log_softmax(row)) for row, c in chosen)), dtype=np.float64)


def penalise(
    mixed: F64,
    prompt_ids: I64,
    output_ids: I64,
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    bias: Mapping[int, float] | None = None,
    forbidden: Sequence[int] = (),
) -> F64:
    """Repetition (prompt and answer: positive logits divided, negative multiplied), presence and frequency (answer
    only: subtracted), additive biases, and forbidden tokens, in this order."""
    adjusted = mixed.copy()
    seen = np.unique(np.concatenate([prompt_ids, output_ids]))
    adjusted[seen] = np.where(adjusted[seen] > 0, adjusted[seen] / repetition, adjusted[seen] * repetition)
    ids, counts = np.unique(output_ids, return_counts=True)
    adjusted[ids] -= presence + frequency * counts
    for token_id, value in (bias or {}).items():
        adjusted[token_id] += value
    adjusted[list(forbidden)] = -np.inf
    return adjusted


def truncate(tempered: F64, top_k: int, top_p: float, min_p: float) -> npt.NDArray[np.bool_]:
    """Which tokens [vocab] stay. Each rule is a threshold, so equal logits stay or go together.

    top-k: not below the k-th largest. top-p, on what top-k left, renormalised: the shortest run of the sorted tokens
    whose probability reaches p. min-p: probability at least min_p of the largest.
    """
    kept = tempered > -np.inf
    if 0 < top_k < len(tempered):
        kept &= tempered >= np.sort(tempered)[-top_k]
    if top_p < 1:
        ordered = np.sort(tempered[kept])[::-1]
        cumulative = np.cumsum(np.exp(ordered - ordered[0]))
        last = int(np.searchsorted(cumulative, top_p * cumulative[-1]))
        kept &= tempered >= ordered[min(last, len(ordered) - 1)]
    if min_p > 0:
        kept &= tempered >= tempered.max() + np.log(min_p)
    return np.asarray(kept)


def sample(
    adjusted: F64,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int,
    position: int,
) -> int:
    """The token drawn from adjusted mixed logits [vocab]."""
    if temperature == 0:
        return int(np.argmax(adjusted))
    tempered = adjusted / temperature
    kept = truncate(tempered, top_k, top_p, min_p)
    noise = gumbel(np.arange(len(adjusted)), position, seed)
    return int(np.argmax(np.where(kept, tempered + noise, -np.inf)))
