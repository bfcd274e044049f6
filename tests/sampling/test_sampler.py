"""The oracle against known answers, and the host sampler against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.samples import penalise, sample_row
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.kernels.oracle import reference
from motet.kernels.oracle.truncation import truncate
from motet.runtime.api.request import Space
from motet.runtime.sampling import host as sampler
from motet.runtime.sampling.host import sample_rows


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.native), "numpy"], autouse=True, scope="module")
def kind(request):
    """Both samplers behind `sample_rows`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_has_native", lambda: request.param == "native")
        yield request.param


def row(count=1, space=Space.LOGITS, **values):
    return sample_row([(i, i, 1.0) for i in range(count)], space, **values)


@pytest.mark.parametrize("rule", [{}, {"typical_p": 0.5}, {"top_p": 0.9}])
@pytest.mark.parametrize(
    ("temperature", "bias", "token"),
    [
        (1e-300, {}, 9),
        (0.01, {2: 1e308}, 2),
        (1e-200, {2: 1e10}, 2),
        (1.0, {2: 1e308}, 2),
        (0.01, {token: -1e308 for token in range(10) if token != 7}, 7),
        (100.0, {token: -1e308 for token in range(10) if token != 7}, 7),
    ],
)
def test_quotients_that_overflow_leave_the_most_probable_token(temperature, bias, token, rule):
    """Logits 0…9, some of them biased: the draw is certain, and it is not that of a NaN."""
    logits = np.arange(10, dtype=np.float32)[None]
    sample = row(temperature=temperature, logit_bias=bias, seed=5, **rule)
    result = sample_rows(logits, [[(0, 1.0)]], [sample])
    assert not result.errors
    assert result.token_ids.tolist() == [token]


def test_philox_known_answer():
    """Random123's vector for counter and key 0 begins with 0x6627e8d5."""
    assert int(reference.philox4x32(np.array([0]), 0, 0)[0]) == 0x6627E8D5


def test_uniforms_stay_inside():
    u = reference.uniform(np.arange(100_000), 5, 2**63 + 9)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_sampler_is_the_oracle(data):
    vocab = data.draw(st.sampled_from([1, 2, 33, 500, 4001]))
    count = data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    logits = (rng.standard_normal((count, vocab)) * 4).astype(np.float32)
    mix = rng.dirichlet(np.ones(count))
    space = data.draw(st.sampled_from(list(Space)))
    params = {
        "temperature": data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        "top_k": data.draw(st.sampled_from([0, 1, 5, 50])),
        "top_p": data.draw(st.sampled_from([1.0, 0.9, 0.2])),
        "min_p": data.draw(st.sampled_from([0.0, 0.05])),
    }
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1, "logit_bias": {0: 2.0}}
    penalised = data.draw(st.booleans())
    prompt, output = rng.integers(0, vocab, 6), rng.integers(0, vocab, 5)
    mask = rng.integers(0, 2**32, -(-vocab // 32), dtype=np.uint32) if data.draw(st.booleans()) else None
    if mask is not None:
        mask[0] |= 1  # a token is left
    edited = {"prompt": prompt, "output": output, "mask": mask, **(penalties if penalised else {})}
    sample = row(count, space, seed=99, position=12, logprobs=3, **params, **edited)
    result = sample_rows(logits, [[(i, float(c)) for i, c in enumerate(mix)]], [sample])
    mixed = reference.mix(logits, mix.tolist(), space)
    adjusted = penalise(mixed, prompt, output, mask=mask, **(penalties if penalised else {}))
    token = reference.sample(adjusted, seed=99, position=12, **params)
    assert result.token_ids[0] == token
    logprobs = reference.log_softmax(mixed.astype(np.float64))
    assert result.logprobs[0] == pytest.approx(logprobs[token], abs=1e-5)
    best = np.argsort(-logprobs, kind="stable")[:3]
    assert [t for t, _ in result.top_logprobs[0]] == best.tolist()


def test_rows_do_not_depend_on_the_batch():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((6, 999)).astype(np.float32)
    samples = [row(seed=i, temperature=1.0, top_p=0.9) for i in range(6)]
    together = sample_rows(logits, [[(i, 1.0)] for i in range(6)], samples)
    alone = [sample_rows(logits[i : i + 1], [[(0, 1.0)]], [samples[i]]).token_ids[0] for i in range(6)]
    assert together.token_ids.tolist() == alone


@pytest.mark.slow
def test_draws_follow_the_distribution():
    """Chi-square of 20,000 draws at different positions."""
    logits = np.array([[0.0, 1.0, -1.0, 0.5, 2.0, -3.0]], np.float32)
    count = 20_000
    samples = [row(position=i, temperature=1.0) for i in range(count)]
    tokens = sample_rows(logits, [[(0, 1.0)]] * count, samples).token_ids
    expected = count * np.exp(reference.log_softmax(logits[0].astype(np.float64)))
    chi_square = ((np.bincount(tokens, minlength=6) - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 99.9 % of the distribution with 5 degrees of freedom


def test_truncation_keeps_what_it_says():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    assert truncate(logits, top_k=2).tolist() == [True, True, False, False]
    assert truncate(logits, top_p=0.74).tolist() == [True, True, False, False]
    assert truncate(logits, top_p=0.76).tolist() == [True, True, True, False]
    assert truncate(logits, min_p=0.29).tolist() == [True, True, True, False]
    assert truncate(logits, top_k=3, top_p=0.8).tolist() == [True, True, False, False]  # of what top-k left, 83 %
    assert truncate(logits, top_k=0, top_p=1.0, min_p=0.0).all()
    with pytest.raises(KeyError, match="top_q"):
        truncate(logits, top_q=1)


def test_mix_one_zero_is_the_member_bit_for_bit():
    logits = np.random.default_rng(3).standard_normal((2, 50)).astype(np.float32)
    for space in ("logits", "probs"):
        assert np.array_equal(reference.mix(logits, [1.0, 0.0], space), logits[0].astype(np.float64))


def test_probs_space_is_the_mean_of_probabilities():
    logits = np.array([[0.0, 1.0], [2.0, 0.0]], np.float32)
    mixed = np.exp(reference.mix(logits, [0.25, 0.75], "probs"))
    expected = 0.25 * np.exp(reference.log_softmax(logits[0].astype(float))) + 0.75 * np.exp(
        reference.log_softmax(logits[1].astype(float))
    )
    assert mixed == pytest.approx(expected)


def test_nan_and_nothing_left_are_errors_of_that_row():
    logits = np.zeros((3, 4), np.float32)
    logits[0, 2], logits[2, 1] = np.nan, np.inf
    samples = [
        row(temperature=0.0, forbidden=(2,)),  # a forbidden NaN is one all the same
        row(temperature=0.0),
        row(temperature=0.0, forbidden=(0, 1, 2, 3)),
        row(temperature=0.0),
    ]
    result = sample_rows(logits, [[(0, 1.0)], [(1, 1.0)], [(1, 1.0)], [(2, 1.0)]], samples)
    assert sorted(result.errors) == [0, 2, 3]
    assert "NaN" in result.errors[0] and "no token" in result.errors[2] and "infinity" in result.errors[3]
    assert result.token_ids[1] == 0


def test_member_logprobs():
    logits = np.random.default_rng(3).standard_normal((2, 50)).astype(np.float32)
    sample = row(2, temperature=0.0, members=True)
    result = sample_rows(logits, [[(0, 0.5), (1, 0.5)]], [sample])
    token = int(result.token_ids[0])
    expected = [reference.log_softmax(r.astype(np.float64))[token] for r in logits]
    assert result.member_logprobs[0] == pytest.approx(expected)
