"""Temperatures of an ensemble's members, fitted with its mix.

In `probs` space each member has its own: it makes a member that is too sure, or not sure enough, fit to be averaged. In `logits`
space only the quotients of coefficient and temperature count, so all members have a common one, which frees the sum of the
quotients. Temperatures are those of a grid, `TEMPERATURES`: the head is computed once for all of them. No step is taken that
makes the loss on the tokens it is fitted on larger, so with temperatures it is at most what it was without.
"""

from __future__ import annotations

import numpy as np

from ...runtime.api.request import Space
from .mixfit import F64, TEMPERATURES, Mask, Pool, convex, em

_ROUNDS = 8  # in which mix and temperatures are fitted in turn, at most
_LEAST = 1e-6  # nats a token that a round has to gain for another one
_ONE = TEMPERATURES.index(1.0)


def fit_temperatures(pool: Pool, mix: F64, share: float, mask: Mask) -> tuple[F64, F64]:
    """(the mix [K], temperatures [K]) that are fitted on the masked tokens, from a mix that was shrunk to the uniform one by
    `share`, as the new one is too. Members without a part in the mix have temperature 1."""
    used = np.flatnonzero(mix)
    fit = _in_probs if pool.space is Space.PROBS or len(used) == 1 else _in_logits
    found, temperatures = np.zeros_like(mix), np.ones(len(mix))
    found[used], temperatures[used] = fit(pool, mix, share, mask)
    return found, temperatures


def _in_probs(pool: Pool, mix: F64, share: float, mask: Mask) -> tuple[F64, F64]:
    """Of the members that are used, [U] each. One temperature after the other is the best of the grid, then the mix is fitted."""
    used = np.flatnonzero(mix)
    curves = np.stack([pool.curve(pool.states[k])[:, mask] for k in used])  # [U, grid, T]
    found, at, own = mix[used], np.full(len(used), _ONE), np.arange(len(used))

    def loss(mix: F64, nll: F64) -> F64:
        """The mean over the tokens of nll [U, …, T]."""
        return np.asarray(-np.logaddexp.reduce(np.log(mix)[:, None] - nll, axis=0).mean(-1))

    best = float(loss(found, curves[own, at]))
    for _ in range(_ROUNDS):
        before = best
        for member in own:
            nll = curves[own, at]
            rest = np.delete(np.log(found)[:, None] - nll, member, 0)
            others = np.logaddexp.reduce(rest, axis=0) if len(rest) else np.full(nll.shape[1], -np.inf)
            losses = -np.logaddexp(others, np.log(found[member]) - curves[member]).mean(-1)  # [grid]
            if losses.min() < best:
                at[member], best = int(losses.argmin()), float(losses.min())
        fitted = _shrunk(em(curves[own, at], found), share)
        if (fitted > 0).all() and (value := float(loss(fitted, curves[own, at]))) < best:
            found, best = fitted, value
        if before - best < _LEAST:
            break
    return found, np.array(TEMPERATURES)[at]


def _in_logits(pool: Pool, mix: F64, share: float, mask: Mask) -> tuple[F64, F64]:
    """The same with one temperature for all."""
    used = np.flatnonzero(mix)
    found, at = mix, _ONE
    best = float(pool.nll(mix)[mask].mean())
    for _ in range(_ROUNDS):
        before = best
        losses = pool.curve(pool.mixed_states(found))[:, mask].mean(-1)
        if losses.min() < best:
            at, best = int(losses.argmin()), float(losses.min())
        fitted = np.zeros_like(mix)
        fitted[used] = _shrunk(convex(pool, found, mask, TEMPERATURES[at])[used], share)
        value = float(pool.nll(fitted, np.full(len(mix), TEMPERATURES[at]))[mask].mean())
        if (fitted[used] > 0).all() and value < best:
            found, best = fitted, value
        if before - best < _LEAST:
            break
    return found[used], np.full(len(used), TEMPERATURES[at])


def _shrunk(mix: F64, share: float) -> F64:
    return (1 - share) * mix + share / len(mix)
