"""Temperatures that are fitted with a mix: planted ones are found, and nothing on a grid is better."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from motet.finetune.search.mixfit import TEMPERATURES, Pool, cross_validated, em, select_and_fit
from motet.finetune.search.temperatures import fit_temperatures
from motet.runtime.api.request import Space

ONES = np.ones(3)


def log_softmax(logits):
    return torch.tensor(logits).log_softmax(-1).numpy()


def pool_of(space, mix, temperatures, count=4000, size=2.0):
    """Tokens that were drawn from a mix of members at these temperatures."""
    rng = np.random.default_rng(3)
    states = rng.standard_normal((len(mix), count, 6)).astype(np.float32) * size
    head = rng.standard_normal((11, 6)).astype(np.float32)
    logits = states.astype(np.float64) @ head.T / np.array(temperatures)[:, None, None]
    mixed = (
        np.tensordot(mix, logits, 1)
        if space is Space.LOGITS
        else np.log(np.tensordot(mix, np.exp(log_softmax(logits)), 1))
    )
    drawn = (log_softmax(mixed) + rng.gumbel(size=mixed.shape)).argmax(-1)
    return Pool(space, torch.tensor(states), torch.tensor(head), torch.tensor(drawn)), logits


def loss(pool, mix, temperatures=None):
    return float(pool.nll(np.asarray(mix), temperatures).mean())


@pytest.mark.parametrize("space", list(Space))
def test_losses_are_those_of_the_definition(space):
    mix, temperatures = np.array([0.5, 0.2, 0.3]), np.array([0.5, 1.0, 2.5])
    pool, _ = pool_of(space, mix, ONES, count=50)
    logits = pool.states.numpy().astype(np.float64) @ pool.head.numpy().T / temperatures[:, None, None]
    members = np.exp(log_softmax(logits))
    mixed = np.tensordot(mix, logits, 1) if space is Space.LOGITS else np.log(np.tensordot(mix, members, 1))
    expected = -log_softmax(mixed)[np.arange(50), pool.targets]
    np.testing.assert_allclose(pool.nll(mix, temperatures), expected, rtol=1e-5, atol=1e-5)
    assert (pool.nll(mix, ONES) == pool.nll(mix)).all()
    curve = pool.curve(pool.states[1])
    at = TEMPERATURES.index(1.0)
    np.testing.assert_allclose(curve[at], pool.single[1], rtol=1e-5, atol=1e-5)
    one = np.eye(3)[1]
    np.testing.assert_allclose(curve[3], pool.nll(one, np.full(3, TEMPERATURES[3])), rtol=1e-5, atol=1e-5)


def test_each_member_has_its_own_in_probs():
    """One is too sure, one not sure enough. Of all pairs of the grid, each with its best mix, none is much better."""
    planted = np.array([2.0, 2**-0.5])
    pool, _ = pool_of(Space.PROBS, (0.6, 0.4), planted)
    start = em(pool.single, np.full(2, 0.5))
    mix, temperatures = fit_temperatures(pool, start, 0.0, np.ones(4000, np.bool_))
    assert np.abs(np.log2(temperatures / planted)).max() <= 0.25
    assert mix == pytest.approx([0.6, 0.4], abs=0.05)
    found = loss(pool, mix, temperatures)
    assert found < loss(pool, start) - 0.01
    curves = [pool.curve(states)[::6] for states in pool.states]
    pairs = [np.stack(pair) for pair in itertools.product(*curves)]
    weights = [em(nll, np.full(2, 0.5), steps=60) for nll in pairs]
    best = min(float(-np.logaddexp.reduce(np.log(w)[:, None] - nll, 0).mean()) for w, nll in zip(weights, pairs))
    assert found < best + 2e-3


def test_one_for_all_in_logits():
    """Coefficients that sum to 1 make a mix of three that agree not sure enough: 0.5 for all is what was planted."""
    pool, _ = pool_of(Space.LOGITS, (0.5, 0.3, 0.2), np.full(3, 0.5), size=0.7)
    everything = np.ones(4000, np.bool_)
    start, share = select_and_fit(pool, everything, np.arange(4000) // 40, max_members=3)
    mix, temperatures = fit_temperatures(pool, start, share, everything)
    assert len(set(temperatures)) == 1
    assert abs(np.log2(temperatures[0] / 0.5)) <= 0.25
    assert mix.sum() == pytest.approx(1)
    assert loss(pool, mix, temperatures) < loss(pool, start) - 0.01


@pytest.mark.parametrize("space", list(Space))
def test_what_needs_none_gets_none_and_no_loss_grows(space):
    mix = np.array([0.5, 0.0, 0.5])
    pool, _ = pool_of(space, mix, ONES)
    mask = np.arange(4000) % 2 == 0
    found, temperatures = fit_temperatures(pool, mix, 0.25, mask)
    assert found[1] == 0
    assert temperatures[1] == 1
    assert np.abs(np.log2(temperatures)).max() <= 0.25
    assert pool.nll(found, temperatures)[mask].mean() <= pool.nll(mix)[mask].mean()
    assert (found[[0, 2]] >= 0.25 / 2 - 1e-9).all()  # it stays shrunk


@pytest.mark.parametrize("space", list(Space))
def test_a_member_alone_is_tempered(space):
    pool, _ = pool_of(space, (1.0,), (2.0,))
    mix, temperatures = fit_temperatures(pool, np.ones(1), 0.0, np.ones(4000, np.bool_))
    assert mix == pytest.approx([1.0])
    assert abs(np.log2(temperatures[0] / 2.0)) <= 0.125


def test_the_nested_figure_fits_temperatures_without_the_documents_that_it_judges():
    pool, _ = pool_of(Space.PROBS, (0.6, 0.4), (2.0, 2**-0.5), count=1500)
    groups, seen = np.arange(1500) // 50, []

    def refine(pool, mix, share, mask):
        seen.append(mask)
        return fit_temperatures(pool, mix, share, mask)

    plain = cross_validated(pool, groups, folds=3, max_members=2)
    fitted = cross_validated(pool, groups, folds=3, max_members=2, refine=refine)
    assert fitted < plain
    held = [set(groups[~mask]) for mask in seen]
    assert len(held) == 3
    assert set.union(*held) == set(groups)
    assert all(not (one & set(groups[mask])) for one, mask in zip(held, seen))
