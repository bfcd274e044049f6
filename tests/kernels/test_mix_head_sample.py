"""The fused head against its oracle: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

from motet.bench.gpu import problems as make  # noqa: E402
from motet.kernels.oracle import eager  # noqa: E402
from motet.kernels.oracle.operands import LinearWeight, Mixture  # noqa: E402
from motet.kernels.triton.mix_head_sample import mix_head_sample, mix_rows  # noqa: E402
from motet.kernels.triton.mix_sample import mix_sample  # noqa: E402

pytestmark = pytest.mark.slow  # Triton's interpreter loops over blocks in Python


def problem(members, vocab=333, size=96, bits=0, dtype=torch.float32, **params):
    head = make.weight(vocab, size, bits, dtype=dtype, seed=1)
    hidden = make.normal(sum(members), size, seed=2, dtype=dtype, scale=3)
    return hidden, head, make.mixture(members), make.draw(len(members), **params)


# By dtype: of the log-probability. In bfloat16 the weights are rounded, of 8 bits after widening.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 2e-5}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("bits", "dtype"), [(0, torch.float32), (8, torch.float32), (0, torch.bfloat16), (0, torch.float16)]
)
@pytest.mark.parametrize("vocab", [1, 64, 333])
def test_against_the_oracle(vocab, bits, dtype, temperature):
    given = problem([1, 3, 2], vocab, bits=bits, dtype=dtype, temperature=temperature)
    tokens, logprobs = mix_head_sample(*given)
    expected_tokens, expected = eager.mix_head_sample(*given)
    assert tokens.tolist() == expected_tokens.tolist()
    torch.testing.assert_close(logprobs, expected, atol=TOLERANCE[dtype], rtol=0)


def test_bfloat16_mixes_are_not_rounded():
    """Without the rest of the rounding, the log-probabilities of a mix would be off by 1 %, not by 0.001."""
    hidden, head, mixture, draw = problem([4] * 8, dtype=torch.bfloat16, temperature=0.0)
    mixed = mix_rows(hidden, mixture)
    torch.testing.assert_close(mixed, eager.mix_rows(hidden, mixture), atol=1e-6, rtol=1e-6)
    exact = (mixed.double() @ head.values.double().t()).log_softmax(-1)
    tokens, logprobs = mix_head_sample(hidden, head, mixture, draw)
    wanted = exact.gather(1, tokens.long()[:, None])[:, 0].float()
    torch.testing.assert_close(logprobs, wanted, atol=5e-4, rtol=0)


def test_it_draws_what_head_and_mix_sample_draw():
    hidden, head, mixture, draw = problem([2, 1, 3, 1], vocab=700, bits=8)
    logits = eager.matmul(hidden, head)[0]
    assert mix_head_sample(hidden, head, mixture, draw)[0].tolist() == mix_sample(logits, mixture, draw)[0].tolist()


def test_batch_invariance_and_more_requests_than_a_tile():
    hidden, head, mixture, draw = problem([1] * 66, vocab=70, size=32)
    tokens, logprobs = mix_head_sample(hidden, head, mixture, draw)
    assert tokens.tolist() == eager.mix_head_sample(hidden, head, mixture, draw)[0].tolist()
    one = Mixture(mixture.starts[:2], mixture.rows[:1], mixture.coefficients[:1], mixture.is_probs[:1], any_probs=False)
    single = type(draw)(
        *(getattr(draw, name)[:1] for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")),
        any_cut=False,
    )
    alone = mix_head_sample(hidden, head, one, single)
    assert torch.equal(alone[0], tokens[:1])
    assert torch.equal(alone[1], logprobs[:1])


def test_nan_is_that_request_s_alone():
    hidden, head, mixture, draw = problem([1, 1, 1])
    tokens, _ = mix_head_sample(hidden, head, mixture, draw)
    hidden[1, 5] = float("nan")
    assert mix_head_sample(hidden, head, mixture, draw)[0].tolist() == [int(tokens[0]), -1, int(tokens[2])]


def test_a_member_with_coefficient_0_takes_no_part():
    hidden, head, mixture, draw = problem([2], temperature=0.0)
    mixture.coefficients.copy_(torch.tensor([1.0, 0.0]))
    hidden[1] = float("nan")
    assert int(mix_head_sample(hidden, head, mixture, draw)[0]) >= 0


def test_what_it_cannot_do_is_refused():
    hidden, head, _, draw = problem([2])
    with pytest.raises(ValueError, match="use mix_sample"):
        mix_head_sample(hidden, head, make.mixture([2], probs=True), draw)
    with pytest.raises(ValueError, match="use mix_sample"):
        mix_head_sample(hidden, head, make.mixture([2]), make.draw(1, top_k=3))
    with pytest.raises(ValueError, match="values must be"):
        mix_head_sample(hidden, LinearWeight(head.values.half()), make.mixture([2]), draw)
