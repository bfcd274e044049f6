"""The device sampler against the host sampler, over everything a request may ask for."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the sampler takes torch tensors")

from helpers.samples import sample_row  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from motet.kernels.oracle import eager  # noqa: E402
from motet.kernels.oracle.operands import LinearWeight  # noqa: E402
from motet.runtime.api.request import Space  # noqa: E402
from motet.runtime.backends.torch.sampler import TorchSampler  # noqa: E402
from motet.runtime.sampling.host import sample_rows  # noqa: E402

VOCAB, HIDDEN = 211, 16
CPU = torch.device("cpu")


def row(space=Space.LOGITS, **values):
    return sample_row((), space, **values)


def sampler(ops=eager, weight=None):
    """A sampler over a random float32 head, and the head."""
    generator = torch.Generator().manual_seed(0)
    head = LinearWeight(torch.randn(VOCAB, HIDDEN, generator=generator) if weight is None else weight)
    return TorchSampler(ops, head, lambda hidden: hidden @ head.values.t(), CPU), head.values


def agree(found, expected):
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert sorted(found.errors) == sorted(expected.errors)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-5)
    for a, b in zip(found.top_logprobs, expected.top_logprobs, strict=True):
        assert [token for token, _ in a] == [token for token, _ in b]
        np.testing.assert_allclose([v for _, v in a], [v for _, v in b], atol=2e-5)
    for name in ("member_logprobs", "candidate_logprobs"):
        for c, d in zip(getattr(found, name), getattr(expected, name), strict=True):
            np.testing.assert_allclose(c, d, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_is_the_host_sampler(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    samples, terms, row_count = [], [], 0
    for index in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(1, 3))
        mix = rng.dirichlet(np.ones(count)).astype(np.float32)
        terms.append([(row_count + i, float(c) if count > 1 else 1.0) for i, c in enumerate(mix)])
        row_count += count
        edited = data.draw(st.booleans())
        values = {
            "temperature": data.draw(st.sampled_from([0.0, 0.7, 1.5])),
            "top_k": data.draw(st.sampled_from([0, 0, 7])),
            "top_p": data.draw(st.sampled_from([1.0, 0.8])),
            "min_p": data.draw(st.sampled_from([0.0, 0.05])),
            "logprobs": data.draw(st.sampled_from([None, 0, 3])),
            "logprob_token_ids": data.draw(st.sampled_from([(), (0, 200, 7)])),
        }
        if edited:
            values |= {
                "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3])),
                "presence_penalty": data.draw(st.sampled_from([0.0, 0.5])),
                "frequency_penalty": data.draw(st.sampled_from([0.0, 0.2])),
                "logit_bias": {3: 1.5, 200: -2.0} if data.draw(st.booleans()) else {},
            }
        samples.append(
            row(
                data.draw(st.sampled_from(list(Space))),
                seed=int(rng.integers(0, 2**63)) * 2 + index % 2,
                position=index,
                prompt=rng.integers(0, VOCAB, 5),
                output=rng.integers(0, VOCAB, data.draw(st.integers(0, 4))),
                forbidden=(1, 2) if edited and data.draw(st.booleans()) else (),
                members=data.draw(st.booleans()),
                mask=rng.integers(0, 2**32, -(-VOCAB // 32), dtype=np.uint32) if data.draw(st.booleans()) else None,
                **values,
            )
        )
    device, head = sampler()
    hidden = torch.from_numpy(rng.standard_normal((row_count, HIDDEN)).astype(np.float32))
    logits = (hidden @ head.t()).numpy()
    agree(device.sample(hidden, terms, samples), sample_rows(logits, terms, samples))


def test_nan_and_nothing_left_are_errors_of_that_sample():
    device, _ = sampler()
    hidden = torch.ones(4, HIDDEN)
    hidden[1] = float("nan")
    everything = tuple(range(VOCAB))
    samples = [
        row(),
        row(),
        row(forbidden=everything, logprobs=2, logprob_token_ids=(1,)),
        row(temperature=0.0, logprobs=1),
    ]
    output = device.sample(hidden, [[(i, 1.0)] for i in range(4)], samples)
    assert sorted(output.errors) == [1, 2]
    assert output.top_logprobs[2] == output.candidate_logprobs[2] == []
    assert len(output.top_logprobs[3]) == 1


def test_a_sample_without_terms_is_left_out():
    device, _ = sampler()
    output = device.sample(torch.ones(1, HIDDEN), [[], [(0, 1.0)]], [row(), row(temperature=0.0)])
    assert output.errors == {}
    assert (
        output.token_ids[1] == device.sample(torch.ones(1, HIDDEN), [[(0, 1.0)]], [row(temperature=0.0)]).token_ids[0]
    )


def test_triton_kernels_sample_the_same():
    pytest.importorskip("triton", reason="triton is not installed")
    from motet.bench.gpu.problems import DEVICE
    from motet.kernels.triton import ops as gpu

    if DEVICE != "cpu":
        pytest.skip("compiled kernels do not run on the CPU; test_torch_backend has the GPU's variant")
    hidden = torch.from_numpy(np.random.default_rng(4).standard_normal((5, HIDDEN)).astype(np.float32))
    terms = [[(0, 1.0)], [(1, 0.4), (2, 0.6)], [(3, 0.4), (4, 0.6)], [(2, 1.0)], [(1, 1.0)]]
    samples = [
        row(temperature=1.0),
        row(temperature=0.7, logprobs=0),
        row(Space.PROBS, top_p=0.9, members=True, logprobs=2),
        row(temperature=0.9, frequency_penalty=0.3, output=(3, 3)),
        row(temperature=0.9, mask=np.full(7, 0x0F0F0F0F, np.uint32)),
    ]
    agree(sampler(gpu)[0].sample(hidden, terms, samples), sampler()[0].sample(hidden, terms, samples))
