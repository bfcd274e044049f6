"""The Triton kernel against the oracle: through the interpreter on a CPU, compiled where there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the kernel takes torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

from motet.bench.gpu.problems import DEVICE  # noqa: E402
from motet.kernels.oracle import eager, reference  # noqa: E402
from motet.kernels.oracle.operands import Draw, Mixture  # noqa: E402
from motet.kernels.triton.mix_sample import mix_sample  # noqa: E402

pytestmark = pytest.mark.slow  # Triton's interpreter loops over blocks in Python

# Tolerances of log-probabilities: float32 sums over the vocabulary; the inputs are exact in every dtype.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def problem(vocab, members, seed, *, spaces=("logits",), dtype=torch.float32, negative=False, **params):
    """(kernel arguments, oracle arguments a request) for requests with `members[i]` rows each."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy((rng.standard_normal((sum(members), vocab)) * 3).astype(np.float32)).to(dtype)
    coefficients = []
    for count in members:
        mix = rng.dirichlet(np.ones(count)).astype(np.float32)
        if negative and count > 1:
            mix[0] = -0.4
            mix[1:] = 1.4 / (count - 1)
        coefficients.append(mix)
    starts = np.concatenate([[0], np.cumsum(members)]).astype(np.int32)
    order = rng.permutation(sum(members)).astype(np.int32)  # a request's rows need not be neighbours
    names = [spaces[i % len(spaces)] for i in range(len(members))]
    batch = len(members)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | params
    seeds = rng.integers(0, 2**63, batch, dtype=np.int64) * 2 + 1
    positions = rng.integers(0, 4000, batch).astype(np.int32)
    mixture = Mixture(
        *(torch.from_numpy(a).to(DEVICE) for a in (starts, order, np.concatenate(coefficients).astype(np.float32))),
        torch.tensor([int(name == "probs") for name in names], dtype=torch.int32, device=DEVICE),
    )
    draw = Draw(
        torch.full((batch,), full["temperature"], dtype=torch.float32, device=DEVICE),
        torch.full((batch,), full["top_k"], dtype=torch.int32, device=DEVICE),
        torch.full((batch,), full["top_p"], dtype=torch.float32, device=DEVICE),
        torch.full((batch,), full["min_p"], dtype=torch.float32, device=DEVICE),
        torch.from_numpy(seeds).to(DEVICE),
        torch.from_numpy(positions).to(DEVICE),
    )
    exact = logits.float().numpy()
    oracle = [
        (
            exact[order[starts[i] : starts[i + 1]]],
            coefficients[i],
            names[i],
            full,
            int(seeds[i]) % 2**64,
            int(positions[i]),
        )
        for i in range(batch)
    ]
    return logits.to(DEVICE), mixture, draw, oracle


def check(logits, mixture, draw, oracle, tolerance):
    tokens, logprobs = mix_sample(logits, mixture, draw)
    for index, (rows, coefficients, space, params, seed, position) in enumerate(oracle):
        mixed = reference.mix(rows, [float(c) for c in coefficients], space)
        expected = reference.sample(mixed, seed=seed, position=position, **params)
        assert int(tokens[index]) == expected, (index, space, params)
        assert abs(float(logprobs[index]) - reference.log_softmax(mixed)[expected]) < tolerance


@pytest.mark.parametrize("vocab", [1, 2, 31, 257, 1000, 5003, 9001])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_odd_vocabularies_and_ragged_members(vocab, temperature):
    check(*problem(vocab, [1, 5, 2, 3], vocab, spaces=("logits", "probs"), temperature=temperature), 2e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_dtypes(dtype):
    check(*problem(777, [2, 4], 3, spaces=("logits", "probs"), dtype=dtype), TOLERANCE[dtype])


def test_negative_coefficients():
    check(*problem(1000, [2, 3, 4], 5, negative=True, temperature=1.3), 5e-5)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_truncation(params):
    check(*problem(515, [1, 3], 11, spaces=("logits", "probs"), temperature=0.9, **params), 2e-5)


def test_batch_invariance():
    """f(x)[:1] == f(x[:1]), bit for bit."""
    logits, mixture, draw, _ = problem(3001, [3, 2, 4], 17, spaces=("probs", "logits"), top_k=40)
    tokens, logprobs = mix_sample(logits, mixture, draw)
    first = Mixture(mixture.starts[:2], mixture.rows[:3], mixture.coefficients[:3], mixture.is_probs[:1])
    fields = (draw.temperature, draw.top_k, draw.top_p, draw.min_p, draw.seeds, draw.positions)
    alone = mix_sample(logits, first, Draw(*(field[:1] for field in fields)))
    assert torch.equal(alone[0], tokens[:1]) and torch.equal(alone[1], logprobs[:1])


@pytest.mark.slow
def test_kernel_draws_follow_the_distribution():
    """Chi-square of 500 draws at different positions against the exact mixed distribution."""
    rng = np.random.default_rng(0)
    count, vocab = 500, 6
    logits = torch.from_numpy(rng.standard_normal((2, vocab)).astype(np.float32)).to(DEVICE)
    mixture = Mixture(
        torch.arange(0, 2 * count + 1, 2, dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 1] * count, dtype=torch.int32, device=DEVICE),
        torch.tensor([0.4, 0.6] * count, dtype=torch.float32, device=DEVICE),
        torch.ones(count, dtype=torch.int32, device=DEVICE),
    )
    ones = torch.ones(count, dtype=torch.float32, device=DEVICE)
    zeros = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    seeds = torch.full((count,), 42, dtype=torch.int64, device=DEVICE)
    positions = torch.arange(count, dtype=torch.int32, device=DEVICE)
    tokens, _ = mix_sample(logits, mixture, Draw(ones, zeros, ones, 0 * ones, seeds, positions))
    exact = np.exp(reference.mix(logits.cpu().numpy(), [0.4, 0.6], "probs"))
    observed = np.bincount(tokens.cpu().numpy(), minlength=vocab)
    chi_square = ((observed - count * exact) ** 2 / (count * exact)).sum()
    assert chi_square < 20.5  # 99.9 % of the distribution with 5 degrees of freedom


def test_nan_and_infinity_are_that_request_s_alone():
    """NaN, +inf or nothing left to choose: token -1 there, the others as without it."""
    logits, mixture, draw, _ = problem(1100, [1, 1, 2, 1, 1], 23, top_p=0.9)
    tokens, _ = mix_sample(logits, mixture, draw)
    spoilt = logits.clone()
    rows = mixture.rows.tolist()
    spoilt[rows[0], 1050] = float("nan")
    spoilt[rows[3], 3] = float("inf")  # a member of request 2
    spoilt[rows[5]] = float("-inf")
    result, logprobs = mix_sample(spoilt, mixture, draw)
    assert result.tolist() == [-1, int(tokens[1]), -1, int(tokens[3]), -1]
    assert logprobs.isnan().tolist() == [True, False, True, False, True]
    assert eager.mix_sample(spoilt, mixture, draw)[0].tolist() == result.tolist()


def test_a_promise_saves_passes_and_changes_nothing():
    logits, mixture, draw, _ = problem(3001, [2, 1], 29)
    fast = (replace(mixture, any_probs=False), replace(draw, any_cut=False))
    assert all(torch.equal(a, b) for a, b in zip(mix_sample(logits, mixture, draw), mix_sample(logits, *fast)))


def test_wrong_arguments_are_refused():
    logits, mixture, draw, _ = problem(100, [2], 1)
    with pytest.raises(ValueError, match="contiguous rows"):
        mix_sample(logits.t(), mixture, draw)
    wrong = Mixture(mixture.starts, mixture.rows.long(), mixture.coefficients, mixture.is_probs)
    with pytest.raises(ValueError, match="rows must be"):
        mix_sample(logits, wrong, draw)
