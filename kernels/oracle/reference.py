"""The oracle of mixing and sampling, in numpy: slow and short. Tests and benches compare every executor with it.

For one request: member logits z_m [members, vocab], coefficients c with Σ c = 1.

    mixed     logits space: Σ c_m z_m        probs space: log Σ c_m softmax(z_m)
    logprob   log_softmax(mixed)[token]
    adjusted  penalties, biases and masks on `mixed` (`edits.py`)
    tempered  adjusted / temperature
    kept      the tokens that the truncation rules keep (`truncation.py`)
    token     argmax over kept of tempered + gumbel;   temperature 0: argmax of adjusted;   ties: the lowest id

A temperature so small that the largest quotient overflows is 0 (`is_greedy`).

The draw is counter-based (Salmon et al. 2011): Philox4x32-10, key = the two words of the seed, counter = (token id,
position, 0, 0), first word x → u = ((x >> 9) + 0.5) · 2⁻²³, gumbel = −log(−log u). It depends only on (seed,
position, token id), not on the batch, the order in which tokens are visited, or the machine. It has 23 bits because
with the half they fill the 24 of a float32: one more bit would round the largest u to 1, whose noise is infinite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .truncation import truncate

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]

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
    """Log-softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def mix(logits: F32, coefficients: Sequence[float], space: str) -> F64:
    """Mixed logits [vocab] of member logits [members, vocab]. Members with coefficient 0 are ignored. `space`:
    "logits" or "probs"."""
    chosen = [(row.astype(np.float64), c) for row, c in zip(logits, coefficients, strict=True) if c != 0]
    if len(chosen) == 1 and chosen[0][1] == 1:
        return np.asarray(chosen[0][0])
    if space == "logits":
        return np.asarray(sum(c * row for row, c in chosen), dtype=np.float64)
    with np.errstate(divide="ignore"):  # a probability of 0 under every member is a mixed logit of -inf
        return np.asarray(np.log(sum(c * np.exp(log_softmax(row)) for row, c in chosen)), dtype=np.float64)


LEAST_TEMPERATURE = 1e-200  # below it quotients of logits overflow


def is_greedy(largest: float, temperature: float) -> bool:
    """Whether the draw is the argmax: the temperature is 0, or so small that `largest` / temperature overflows."""
    return temperature < LEAST_TEMPERATURE or not np.isfinite(np.float64(largest) / temperature)


def sample(adjusted: F64, *, temperature: float, seed: int, position: int, **rules: float) -> int:
    """The token drawn from adjusted mixed logits [vocab]. `rules`: truncation rule → value."""
    with np.errstate(over="ignore"):
        if is_greedy(adjusted.max(), temperature):
            return int(np.argmax(adjusted))
        tempered = adjusted / temperature
    kept = truncate(tempered, **rules)
    noise = gumbel(np.arange(len(adjusted)), position, seed)
    return int(np.argmax(np.where(kept, tempered + noise, -np.inf)))
