"""Typical sampling is transformers' `TypicalLogitsWarper`, whatever executes the draw."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.samples import sample_row
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.kernels.native import library
from motet.kernels.oracle import eager, reference
from motet.kernels.oracle.operands import LinearWeight
from motet.kernels.oracle.truncation import truncate
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.errors import InvalidRequestError
from motet.runtime.sampling import host
from motet.runtime.serve.grpc.wire import request_to_proto

torch = pytest.importorskip("torch", reason="the reference takes torch tensors")
warpers = pytest.importorskip("transformers", reason="the reference is transformers'")

VOCAB, ROWS = 211, 12


def warped(tempered, p):
    """Logits [vocab] after transformers' warper, -inf for what goes."""
    return warpers.TypicalLogitsWarper(p)(None, torch.from_numpy(tempered)[None])[0].numpy()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    p=st.sampled_from([0.05, 0.2, 0.5, 0.9, 0.95, 0.999]),
    scale=st.sampled_from([0.1, 1, 5]),
)
def test_the_oracle_keeps_what_transformers_keeps(seed, p, scale):
    tempered = np.random.default_rng(seed).standard_normal(VOCAB) * scale
    assert truncate(tempered, typical_p=p).tolist() == np.isfinite(warped(tempered, p)).tolist()


def test_it_sees_what_the_rules_before_it_left():
    tempered = np.random.default_rng(1).standard_normal(VOCAB) * 3
    left = np.where(truncate(tempered, top_k=20, min_p=0.05), tempered, -np.inf)
    kept = truncate(tempered, typical_p=0.6, min_p=0.05, top_k=20)
    assert kept.tolist() == np.isfinite(warped(left, 0.6)).tolist()
    assert 0 < kept.sum() < np.isfinite(left).sum()


def test_equal_logits_stay_together_and_one_stays():
    assert truncate(np.zeros(7), typical_p=0.01).all()
    assert truncate(np.array([0.0]), typical_p=0.01).all()
    assert truncate(np.array([5.0, 5.0, -40.0]), typical_p=0.5).tolist() == [True, True, False]


@pytest.mark.parametrize("value", [0.0, 1.1, float("nan")])
def test_bad_values_are_refused(value):
    with pytest.raises(InvalidRequestError, match=r"typical_p must be a number in \(0, 1\]"):
        sample_row(typical_p=value)


def test_it_crosses_the_wire():
    sampling = request_to_proto("x", sampling=SamplingParams(typical_p=0.25)).sampling
    assert sampling.HasField("typical_p")
    assert sampling.typical_p == 0.25


@pytest.fixture(params=["native", "numpy", "torch", "triton"])
def draw(request, monkeypatch):
    """(hidden [R, H], head [vocab, H], terms, samples) → token ids, through one of the samplers."""
    if request.param in ("native", "numpy"):
        if request.param == "native" and not library.is_available():
            pytest.skip("the native kernels were not built")
        monkeypatch.setattr(host, "_has_native", lambda: request.param == "native")
        return lambda hidden, head, *rest: host.sample_rows((hidden @ head.t()).numpy(), *rest).token_ids
    ops = eager
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        from motet.bench.gpu.problems import DEVICE
        from motet.kernels.triton import ops

        if DEVICE != "cpu":
            pytest.skip("compiled kernels do not run on the CPU")
    from motet.runtime.backends.torch.sampler import TorchSampler

    def sample(hidden, head, terms, samples):
        device = torch.device("cpu")
        sampler = TorchSampler(ops, LinearWeight(head), lambda states: states @ head.t(), device)
        return sampler.sample(hidden, terms, samples).token_ids

    return sample


def test_every_sampler_draws_from_what_transformers_keeps(draw):
    """Rows with the rule and without it in one step, alone and mixed."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(ROWS, 16, generator=generator), torch.randn(VOCAB, 16, generator=generator)
    logits = (hidden @ head.t()).numpy()
    samples, terms, expected = [], [], []
    for row in range(ROWS):
        own = [(row, 1.0)] if row % 3 else [(row, 0.5), ((row + 1) % ROWS, 0.5)]
        values = {"temperature": 1.5, "typical_p": 0.4 if row % 2 else 1.0, "repetition_penalty": 1.3}
        samples.append(sample_row(seed=row, position=row, prompt=(1, 2, 3, 50), **values))
        terms.append(own)
        mixed = reference.mix(logits[[at for at, _ in own]], [c for _, c in own], "logits")
        mixed[[1, 2, 3, 50]] = np.where(
            mixed[[1, 2, 3, 50]] > 0, mixed[[1, 2, 3, 50]] / 1.3, mixed[[1, 2, 3, 50]] * 1.3
        )
        kept = warped(mixed / 1.5, 0.4) if row % 2 else mixed / 1.5
        expected.append(int(np.argmax(kept + reference.gumbel(np.arange(VOCAB), row, row))))
    assert draw(hidden, head, terms, samples).tolist() == expected
