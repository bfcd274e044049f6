"""The native sampler against the oracle: every parameter, every instruction set, and bad logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.native import model_config
from helpers.samples import edits_of
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.kernels.native import library
from motet.kernels.native.model import NativeModel
from motet.kernels.native.sampling import NOT_FINITE, NOTHING_LEFT, Sample, sample
from motet.kernels.oracle import reference
from motet.kernels.oracle.edits import NO_EDITS, apply_edits
from motet.runtime.sampling import host as sampler

pytestmark = pytest.mark.native
ISAS = library.isa_names() if library.is_available() else ()
VOCABULARIES = (1, 17, 320, 49152)


def sample_of(temperature=1.0, edits=NO_EDITS, seed=0, position=0, logprobs=None, **rules):
    """A sample of row 0."""
    return Sample(
        [(0, 1.0)],
        temperature=temperature,
        truncation=rules,
        edits=edits,
        seed=seed,
        position=position,
        logprobs=logprobs,
    )


def oracle(logits, one):
    """(mixed logits, token) by `kernels.oracle`."""
    rows, mix = [row for row, _ in one.terms], [c for _, c in one.terms]
    mixed = reference.mix(logits[rows], mix, "probs" if one.probs else "logits")
    adjusted = apply_edits(mixed, one.edits)
    token = reference.sample(
        adjusted, temperature=one.temperature, seed=one.seed, position=one.position, **one.truncation
    ) if adjusted.max() > -np.inf else -1  # fmt: skip
    return mixed, token


def check(logits, one, isa):
    mixed, token = oracle(logits, one)
    result = sample(logits, [one], isa=isa)
    assert result.token_ids[0] == token, (one, isa)
    assert result.codes[0] == (NOTHING_LEFT if token < 0 else 0)
    if token < 0 or one.logprobs is None:
        return
    logprobs = reference.log_softmax(mixed)
    assert result.logprobs[0] == pytest.approx(logprobs[token], rel=1e-12, abs=1e-12)
    count = min(one.logprobs, len(mixed))
    best = np.argsort(-logprobs, kind="stable")[:count]
    assert result.top_logprobs[0, :count] == pytest.approx(logprobs[best], rel=1e-12, abs=1e-12)
    if not one.probs:  # a mix of probabilities may order equal ones otherwise, by the last bit
        assert result.top_ids[0, :count].tolist() == best.tolist()
    assert result.candidate_logprobs == pytest.approx(logprobs[list(one.candidates)], rel=1e-12, abs=1e-12)
    if one.member_logprobs:
        alone = [reference.log_softmax(logits[row].astype(np.float64))[token] for row, _ in one.terms]
        assert result.member_logprobs == pytest.approx(alone, rel=1e-12, abs=1e-12)


def logits_of(rng, count, vocab, kind):
    """Gaussian, like a language model's (a few far above the rest), nearly flat, on a coarse grid, or with -inf."""
    logits = rng.standard_normal((count, vocab)) * {"flat": 0.01, "wide": 40.0}.get(kind, 3.0)
    if kind == "peaked":
        logits[:, rng.integers(0, vocab, 20)] += rng.uniform(5, 15, 20)
    if kind == "grid":
        logits = np.round(logits)
    if kind == "holes":
        logits[:, rng.random(vocab) < 0.7] = -np.inf
        logits[:, rng.integers(0, vocab)] = 1.0
    return logits.astype(np.float32)


@st.composite
def problems(draw, vocabularies=VOCABULARIES[:3]):
    vocab = draw(st.sampled_from(vocabularies))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 4))
    probs = draw(st.booleans())
    kind = draw(st.sampled_from(["gauss", "peaked", "flat", "wide", "grid", "holes"]))
    mix = rng.dirichlet(np.ones(count))
    if count > 1 and not probs and kind != "holes" and draw(st.booleans()):
        mix[0], mix[1:] = -0.5, 1.5 / (count - 1)
    if draw(st.booleans()):
        mix = np.eye(count)[rng.integers(count)]
    pick = st.sampled_from
    one = Sample(
        terms=[(i, float(c)) for i, c in enumerate(mix)],
        probs=probs,
        temperature=draw(pick([0.0, 0.01, 0.3, 1.0, 2.0, 100.0])),
        truncation={
            "top_k": draw(pick([0, 0, 1, 2, 5, 50, 300, 5000])),
            "top_p": draw(pick([1.0, 1.0, 0.999999, 0.95, 0.5, 0.01, 1e-9])),
            "min_p": draw(pick([0.0, 0.0, 1e-9, 0.05, 1.0])),
        },
        seed=draw(st.integers(0, 2**64 - 1)),
        position=draw(st.integers(0, 2**31)),
        logprobs=draw(pick([None, 0, 1, 5, 20])),
        member_logprobs=draw(st.booleans()),
    )
    if one.logprobs is not None and draw(st.booleans()):
        one = replace(one, candidates=rng.integers(0, vocab, draw(st.integers(1, 30))).tolist())
    if draw(st.booleans()):
        edits = edits_of(
            rng.integers(0, vocab, draw(st.integers(0, 40))),
            rng.integers(0, vocab, draw(st.integers(0, 20))),
            set(rng.integers(0, vocab, draw(st.integers(0, 3))).tolist()),
            repetition_penalty=draw(pick([1.0, 1.3, 0.7])),
            presence_penalty=draw(pick([0.0, 0.6, -0.4])),
            frequency_penalty=draw(pick([0.0, 0.3])),
            logit_bias={int(i): float(rng.standard_normal() * 4) for i in rng.integers(0, vocab, 3)},
        )
        one = replace(one, edits=edits)
    if draw(st.booleans()):
        mask = rng.integers(0, 2**32, -(-vocab // 32), dtype=np.uint32)
        one = replace(one, edits=replace(one.edits, mask=mask))
    return logits_of(rng, count, vocab, kind), one


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=250, deadline=None)
@given(problem=problems())
def test_native_is_the_oracle(isa, problem):
    check(*problem, isa)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(problem=problems((49152,)))
def test_native_is_the_oracle_on_a_whole_vocabulary(isa, problem):
    check(*problem, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(
    "parameters", [{}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.5}, {"temperature": 0.0}], ids=str
)
def test_ties_stay_together_and_the_lowest_id_wins(isa, vocab, parameters):
    rng = np.random.default_rng(vocab)
    for logits in (np.zeros((1, vocab)), rng.integers(0, 2, (1, vocab)), np.full((1, vocab), 1e30)):
        for position in range(8):
            one = sample_of(seed=1, position=position, logprobs=min(4, vocab), **parameters)
            check(logits.astype(np.float32), one, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_equal_scores_of_huge_logits_take_the_lowest_id(isa):
    """Where the noise is smaller than the spacing of doubles."""
    logits = np.full((1, 500), -3e38, np.float32)
    logits[0, [33, 77, 400]] = np.float32(1e20), np.float32(1e20), np.nextafter(np.float32(1e20), np.float32(0))
    for temperature in (1.0, 1e-3, 1e-300):
        assert sample(logits, [Sample([(0, 1.0)], temperature=temperature)], isa=isa).token_ids[0] == 33
    check(logits, Sample([(0, 1.0)], temperature=50.0), isa)


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75, 1 - 2**-53, 1 - 1e-12, 0.1, 0.9])
def test_top_p_at_its_edge_is_the_oracle(top_p):
    """Sums of probabilities that hit p exactly, and p so near 1 that the order of a sum decides."""
    rng = np.random.default_rng(5)
    rows = [np.zeros(4), np.repeat([0.0, -1.0], 2048), np.log(2.0) * -np.arange(40), -rng.random(3000) * 60]
    for logits in rows:
        for seed in range(20):
            check(logits[None].astype(np.float32), sample_of(top_p=top_p, seed=seed), None)


def test_every_path_returns_the_same_bits():
    rng = np.random.default_rng(9)
    logits = logits_of(rng, 6, 4001, "peaked")
    samples = [
        Sample(
            [(i, 0.3), ((i + 1) % 6, 0.7)],
            probs=i % 2 == 0,
            truncation={"top_p": 0.9},
            seed=i,
            logprobs=7,
            candidates=range(10 * i, 12 * i),
            member_logprobs=True,
        )
        for i in range(6)
    ]
    first, *others = [sample(logits, samples, isa=isa) for isa in ISAS]
    for other in others:
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs", "member_logprobs", "candidate_logprobs"):
            assert np.array_equal(getattr(first, name), getattr(other, name)), name


def test_a_sample_does_not_depend_on_its_neighbours_or_threads():
    rng = np.random.default_rng(2)
    logits = logits_of(rng, 24, 3001, "gauss")
    logits[5, 7] = np.nan
    samples = [
        Sample(
            [(i, 0.5), ((i + 1) % 24, 0.5)], probs=i % 3 == 0, temperature=i % 4 / 2, truncation={"top_k": i},
            edits=edits_of(rng.integers(0, 3001, 30), repetition_penalty=1 + i % 2), seed=i, logprobs=i % 5, candidates=range(i),
            member_logprobs=True,
        )
        for i in range(24)
    ]  # fmt: skip
    model = NativeModel(model_config(threads=3))
    alone = [sample(logits, [one]) for one in samples]
    for together in (sample(logits, samples), sample(logits, samples, model)):
        assert np.flatnonzero(together.codes).tolist() == [4, 5]
        assert together.token_ids.tolist() == [one.token_ids[0] for one in alone]
        assert np.array_equal(together.logprobs, [one.logprobs[0] for one in alone], equal_nan=True)
        for name in ("member_logprobs", "candidate_logprobs"):
            joined = np.concatenate([getattr(one, name) for one in alone])
            assert np.array_equal(getattr(together, name), joined, equal_nan=True)
    model.close()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_bad_logits_are_codes_of_their_sample(isa, vocab):
    logits = np.zeros((4, vocab), np.float32)
    logits[1, vocab // 2] = np.nan
    logits[2, vocab - 1] = np.inf
    logits[3] = -np.inf
    half = [[(0, 0.5), (row, 0.5)] for row in range(4)]
    for temperature in (0.0, 1.0):
        for probs in (False, True):
            samples = [
                Sample(terms, probs, temperature, logprobs=1) for terms in (*half, *([(r, 1.0)] for r in range(4)))
            ]
            codes = sample(logits, samples, isa=isa).codes.tolist()
            last = NOT_FINITE if probs else NOTHING_LEFT  # a member with no token has no probabilities
            assert codes == [0, NOT_FINITE, NOT_FINITE, last, 0, NOT_FINITE, NOT_FINITE, NOTHING_LEFT]
        everything = sample_of(temperature=temperature, edits=edits_of(forbidden=range(vocab)))
        mask = np.zeros(-(-vocab // 32), np.uint32)
        nothing = sample_of(temperature=temperature, edits=replace(NO_EDITS, mask=mask))
        assert sample(logits, [everything, nothing], isa=isa).codes.tolist() == [NOTHING_LEFT] * 2


def test_a_term_with_coefficient_0_takes_no_part():
    logits = np.random.default_rng(1).standard_normal((2, 50)).astype(np.float32)
    logits[1] = np.nan
    for probs in (False, True):
        result = sample(logits, [Sample([(0, 1.0), (1, 0.0)], probs, member_logprobs=True)])
        assert result.token_ids[0] == sample(logits, [Sample([(0, 1.0)])]).token_ids[0]
        assert np.isnan(result.member_logprobs).tolist() == [False, True]


@pytest.mark.parametrize("probs", [False, True])
def test_native_draws_follow_the_distribution(probs):
    """Chi-square of 20,000 draws at different positions from a mix of two members."""
    logits = np.array([[0.0, 1.0, -1.0, 0.5, 2.0, -3.0], [1.0, 0.0, 0.0, 0.0, -1.0, 2.0]], np.float32)
    count = 20_000
    samples = [Sample([(0, 0.4), (1, 0.6)], probs, position=i) for i in range(count)]
    mixed = reference.mix(logits, [0.4, 0.6], "probs" if probs else "logits")
    expected = count * np.exp(reference.log_softmax(mixed))
    observed = np.bincount(sample(logits, samples).token_ids, minlength=6)
    assert ((observed - expected) ** 2 / expected).sum() < 20.5  # 99.9 % of the distribution with 5 degrees of freedom


def test_the_largest_uniform_is_below_one():
    """A word of ones would be infinite noise if its uniform were rounded to 1: any token could be drawn then."""
    largest = max(reference.uniform(np.arange(1 << 20), position, 5).max() for position in range(24))
    assert 1 - 1e-6 < largest < 1


def test_any_layout_of_the_rows_is_read():
    logits = np.random.default_rng(1).standard_normal((4, 40)).astype(np.float32)
    for view in (
        logits[0][None],
        logits[:1, :33],
        logits[:, :33],
        logits[::-1],
        logits[:, ::2],
        logits.T,
        logits.astype(np.float64),
    ):
        drawn = sample(view, [Sample([(i, 1.0)], temperature=0.0) for i in range(len(view))]).token_ids
        assert drawn.tolist() == view.argmax(axis=1).tolist()
    assert len(sample(logits, []).token_ids) == 0


def test_sample_rows_takes_the_native_sampler():
    assert sampler._has_native()
