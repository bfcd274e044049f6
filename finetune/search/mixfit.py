"""Choosing members and fitting their mix.

Greedy selection with replacement (Caruana et al. 2004): each round adds the member that improves the mix most, so a
member is judged by what it adds, not by how good it is alone. The counts are a first mix, which is then fitted: with
EM on the simplex for `probs` (the classic mixture-weight update), with a convex program for `logits`, whose loss is
convex in the coefficients (log-sum-exp of an affine function minus a linear one). At last the mix is shrunk towards the
uniform one, by a share that cross-validation by document chooses: with few documents, a fit follows their noise.
Temperatures are fitted after that, on a grid (`temperatures`).

Losses are kept per token, so folds and bootstraps only sum over tokens that are already measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from ...runtime.api.request import Space

F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Groups = npt.NDArray[np.int64]
SHARES = (0.0, 0.25, 0.5, 1.0)  # by which a fitted mix may be shrunk to uniform
TEMPERATURES = tuple((2 ** np.linspace(-1, 2, 25)).tolist())  # that are tried; one of them is 1
_ROWS = 512  # rows per head product: at most 512 × vocabulary logits in memory


@dataclass(slots=True)
class Pool:
    """The hidden states of K members on one set of answers with T tokens.

    `states` [K, T, hidden] normed; `head` [vocab, hidden], linear; `targets` [T] token ids. Results of `nll` are
    cached by mix and temperatures.
    """

    space: Space
    states: Tensor
    head: Tensor
    targets: Tensor
    single: F64 = field(init=False)  # [K, T] negative log-likelihood of each member alone, nats
    _known: dict[tuple[float, ...], F64] = field(default_factory=dict)
    _tempered: dict[tuple[int, float], F64] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.single = np.stack([self._logits_nll(states) for states in self.states])

    def nll(self, mix: F64, temperatures: F64 | None = None) -> F64:
        """[T] negative log-likelihood in nats of each token under the mix [K] of members whose logits are divided by
        `temperatures` [K] (None: 1)."""
        divisors = np.ones(len(mix)) if temperatures is None else temperatures
        key = tuple(round(float(x), 9) for x in (*mix, *divisors))
        if key not in self._known:
            self._known[key] = self._nll(np.asarray(mix, np.float64), divisors)
        return self._known[key]

    def _nll(self, mix: F64, temperatures: F64) -> F64:
        used = np.flatnonzero(mix)
        if len(used) == 1 and mix[used[0]] == 1:
            return self._single_at(int(used[0]), temperatures[used[0]])
        if self.space is Space.PROBS:
            single = np.stack([self._single_at(int(k), temperatures[k]) for k in used])
            with np.errstate(divide="ignore"):
                return np.asarray(-np.logaddexp.reduce(np.log(mix[used])[:, None] - single, axis=0))
        return self._logits_nll(self.mixed_states(mix / temperatures))

    def _single_at(self, member: int, temperature: float) -> F64:
        if temperature == 1:
            return np.asarray(self.single[member])
        key = member, float(temperature)
        if key not in self._tempered:
            self._tempered[key] = self._logits_nll(self.states[member] / temperature)
        return self._tempered[key]

    def mixed_states(self, coefficients: F64) -> Tensor:
        """[T, hidden] Σ coefficients [K] · states."""
        used = np.flatnonzero(coefficients)
        return torch.einsum(
            "k,kth->th", torch.tensor(coefficients[used], dtype=torch.float32), self.states[torch.from_numpy(used)]
        )

    @torch.no_grad()
    def curve(self, states: Tensor) -> F64:
        """[temperatures of the grid, T] negative log-likelihood with the logits of states [T, hidden] divided by each. The head
        is computed once."""
        parts = []
        for rows, targets in zip(torch.split(states, _ROWS), torch.split(self.targets, _ROWS)):
            logits = rows @ self.head.T
            chosen = logits.gather(1, targets[:, None])[:, 0]
            parts.append(torch.stack([torch.logsumexp(logits / t, -1) - chosen / t for t in TEMPERATURES]))
        return np.asarray(torch.cat(parts, 1).double().numpy())

    @torch.no_grad()
    def _logits_nll(self, states: Tensor) -> F64:
        parts = [
            F.cross_entropy(rows @ self.head.T, targets, reduction="none")
            for rows, targets in zip(torch.split(states, _ROWS), torch.split(self.targets, _ROWS))
        ]
        return np.asarray(torch.cat(parts).double().numpy())

    def gradient(self, mix: F64, used: Sequence[int], mask: Mask, temperature: float = 1.0) -> tuple[float, F64]:
        """(mean loss over the masked tokens, its gradient by the coefficients `mix` of the members `used`), in
        `logits` space, all members at one temperature."""
        rows = torch.from_numpy(np.flatnonzero(mask))
        coefficients = torch.tensor(mix, dtype=torch.float32, requires_grad=True)
        total = 0.0
        for part in torch.split(rows, _ROWS):
            mixed = torch.einsum("k,kth->th", coefficients / temperature, self.states[list(used)][:, part])
            loss = F.cross_entropy(mixed @ self.head.T, self.targets[part], reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        assert coefficients.grad is not None
        return total / len(rows), np.asarray(coefficients.grad.double().numpy() / len(rows))


Refine = Callable[[Pool, F64, float, Mask], tuple[F64, F64]]


def greedy(
    num_members: int, loss: Callable[[F64], float], *, max_members: int, rounds: int, candidates: Sequence[int]
) -> F64:
    """The best mix [K] of the rounds of greedy selection, with at most `max_members` distinct members."""
    counts = np.zeros(num_members)
    best, best_loss = counts, np.inf
    for _ in range(rounds):
        allowed = [k for k in candidates if counts[k] or np.count_nonzero(counts) < max_members]
        losses = [loss((counts + np.eye(num_members)[k]) / (counts.sum() + 1)) for k in allowed]
        counts = counts + np.eye(num_members)[allowed[int(np.argmin(losses))]]
        if min(losses) < best_loss:
            best, best_loss = counts / counts.sum(), min(losses)
    return best


def em(nll: F64, start: F64, *, steps: int = 500, tolerance: float = 1e-10) -> F64:
    """Mixture weights [K] of fixed components with `nll` [K, T], from `start` [K] on the simplex. Each step raises the
    likelihood."""
    mix = start / start.sum()
    likelihood = np.exp(-(nll - nll.min(axis=0)))  # scaled per token, which changes no responsibility
    for _ in range(steps):
        joint = mix[:, None] * likelihood
        update = (joint / joint.sum(axis=0)).mean(axis=1)
        if np.abs(update - mix).max() < tolerance:
            break
        mix = update
    return np.asarray(update / update.sum())


def convex(pool: Pool, start: F64, mask: Mask, temperature: float = 1.0) -> F64:
    """The coefficients [K] ≥ 0 with sum 1, of the members of `start`, that minimise the mean loss in `logits` space, all at
    one temperature."""
    used = np.flatnonzero(start)
    if len(used) == 1:
        return start
    result = minimize(
        lambda x: pool.gradient(x, list(used), mask, temperature),
        start[used],
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * len(used),
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: np.ones_like(x)},
        options={"maxiter": 25, "ftol": 1e-6},
    )
    values = np.clip(result.x, 0, None)
    values[values < 1e-3] = 0.0  # a member that adds nothing still costs a tail at every step
    mix = np.zeros_like(start)
    mix[used] = values / values.sum()
    return mix


def select_and_fit(
    pool: Pool, mask: Mask, groups: Groups, *, max_members: int, rounds: int = 12, shortlist: int = 8
) -> tuple[F64, float]:
    """(the mix [K] that is chosen and fitted on the masked tokens, the share by which it was shrunk to uniform).

    `groups` [T]: the document of each token. In `logits` space every candidate costs a head product, so only the
    `shortlist` members that are best alone are candidates.
    """
    order = list(np.argsort(pool.single[:, mask].mean(axis=1)))
    candidates = order[:shortlist] if pool.space is Space.LOGITS else order
    mix = greedy(
        len(pool.single),
        lambda m: float(pool.nll(m)[mask].mean()),
        max_members=max_members,
        rounds=rounds,
        candidates=candidates,
    )
    fitted = fit_mix(pool, mix, mask)
    return shrink(pool, fitted if pool.nll(fitted)[mask].mean() <= pool.nll(mix)[mask].mean() else mix, mask, groups)


def fit_mix(pool: Pool, start: F64, mask: Mask) -> F64:
    """The coefficients [K] of the members of `start` that minimise the mean loss over the masked tokens."""
    if pool.space is Space.LOGITS:
        return convex(pool, start, mask)
    used = np.flatnonzero(start)
    fitted = np.zeros_like(start)
    fitted[used] = em(pool.single[used][:, mask], start[used])
    return fitted


def shrink(pool: Pool, mix: F64, mask: Mask, groups: Groups, *, folds: int = 3) -> tuple[F64, float]:
    """(the mix [K] moved towards the uniform one of its members, by which share). Mixes that are fitted on some of the
    documents choose the share on the others; 0 if there are fewer than two documents."""
    used = mix != 0
    documents = np.unique(groups[mask])
    if used.sum() == 1 or len(documents) < 2:
        return mix, 0.0
    uniform = used / used.sum()
    losses = np.zeros(len(SHARES))
    for fold in np.array_split(np.random.default_rng(1).permutation(documents), min(folds, len(documents))):
        held = mask & np.isin(groups, fold)
        fitted = fit_mix(pool, uniform, mask & ~held)
        losses += [float(pool.nll((1 - share) * fitted + share * uniform)[held].sum()) for share in SHARES]
    share = SHARES[int(np.argmin(losses))]
    return (1 - share) * mix + share * uniform, share


def cross_validated(pool: Pool, groups: Groups, *, folds: int, max_members: int, refine: Refine | None = None) -> float:
    """Mean loss of mixes on documents that were used neither to select nor to fit nor to shrink them (the outer loop of
    nested cross-validation).

    `groups` [T]: the document of each token. No document is on both sides of a split. `refine`: what else is fitted there, from
    (pool, mix, share, mask) to (mix, temperatures).
    """
    rng = np.random.default_rng(0)
    documents = rng.permutation(np.unique(groups))
    total = 0.0
    for fold in np.array_split(documents, min(folds, len(documents))):
        held = np.isin(groups, fold)
        mix, share = select_and_fit(pool, ~held, groups, max_members=max_members)
        mix, temperatures = refine(pool, mix, share, ~held) if refine is not None else (mix, None)
        total += float(pool.nll(mix, temperatures)[held].sum())
    return total / len(groups)


@dataclass(frozen=True, slots=True)
class Interval:
    """Relative change of the mean loss and its 95 % interval. Negative is better."""

    change: float
    low: float
    high: float


def paired_bootstrap(before: F64, after: F64, groups: npt.NDArray[np.int64], *, draws: int = 10_000) -> Interval:
    """The change from `before` to `after`, losses [T]. The bootstrap draws whole groups (examples or documents,
    [T])."""
    names, index = np.unique(groups, return_inverse=True)
    old = np.bincount(index, before)
    new = np.bincount(index, after)
    rng = np.random.default_rng(0)
    changes = []
    for _ in range(draws):
        drawn = rng.integers(0, len(names), len(names))
        changes.append(new[drawn].sum() / old[drawn].sum() - 1)
    low, high = np.quantile(changes, [0.025, 0.975])
    return Interval(float(new.sum() / old.sum() - 1), float(low), float(high))
