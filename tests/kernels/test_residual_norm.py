"""Fused residual + norm against its oracle: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

from motet.bench.gpu import problems as make  # noqa: E402
from motet.kernels.oracle import eager  # noqa: E402
from motet.kernels.triton.residual_norm import residual_norm  # noqa: E402

# (atol, rtol) of the normed row by its dtype: the sums are float32 everywhere, the result is rounded once.
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (1e-3, 8e-3), torch.float16: (1e-4, 1e-3)}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("splits", "size", "layer"), [(0, 64, False), (1, 576, False), (3, 100, True), (2, 1, False)])
def test_against_the_oracle(splits, size, layer, dtype):
    weight, bias = make.normal(size, seed=1), make.normal(size, seed=2) if layer else None
    branch = make.normal(splits, 5, size, seed=3) if splits else None
    residual = make.normal(5, size, seed=4)
    expected_stream, stream = residual.clone(), residual.clone()
    expected = eager.residual_norm(branch, expected_stream, weight, bias, 1e-5, dtype)
    found = residual_norm(branch, stream, weight, bias, 1e-5, dtype)
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)
    torch.testing.assert_close(stream, expected_stream, atol=1e-6, rtol=1e-6)
    if branch is None:
        assert torch.equal(stream, residual)


def test_batch_invariance():
    branch, residual = make.normal(2, 7, 96, seed=5), make.normal(7, 96, seed=6)
    weight = make.normal(96, seed=7)
    alone = residual_norm(branch[:, :1].contiguous(), residual[:1].clone(), weight, None, 1e-5, torch.float32)
    assert torch.equal(residual_norm(branch, residual.clone(), weight, None, 1e-5, torch.float32)[:1], alone)


def test_no_rows_is_no_work():
    assert residual_norm(None, make.normal(0, 8), make.normal(8), None, 1e-5, torch.float32).shape == (0, 8)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="weight must be"):
        residual_norm(None, make.normal(2, 8), make.normal(9), None, 1e-5, torch.float32)
    with pytest.raises(ValueError, match="branch must be"):
        residual_norm(
            make.normal(1, 8, 2).transpose(1, 2), make.normal(2, 8), make.normal(8), None, 1e-5, torch.float32
        )
