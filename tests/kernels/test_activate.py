"""Fused activation against its oracle: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

from motet.bench.gpu import problems as make  # noqa: E402
from motet.kernels.oracle import eager  # noqa: E402
from motet.kernels.triton.activate import activate  # noqa: E402

TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.bfloat16: (1e-3, 8e-3), torch.float16: (1e-4, 1e-3)}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "gelu_erf"])
@pytest.mark.parametrize(("splits", "size"), [(1, 1), (3, 129), (2, 1536)])
def test_against_the_oracle(splits, size, activation, dtype):
    parts = make.normal(splits, 3, 2 * size if activation in ("swiglu", "geglu") else size, seed=size, scale=3)
    atol, rtol = TOLERANCE[dtype]
    expected = eager.activate(parts, activation, dtype)
    torch.testing.assert_close(activate(parts, activation, dtype), expected, atol=atol, rtol=rtol)


def test_large_values_saturate():
    parts = torch.tensor([[[-200.0, 200.0]]], device=make.DEVICE)
    assert activate(parts, "gelu", torch.float32).tolist() == [[0.0, 200.0]]


def test_batch_invariance():
    parts = make.normal(2, 5, 64)
    alone = activate(parts[:, :1].contiguous(), "swiglu", torch.float32)
    assert torch.equal(activate(parts, "swiglu", torch.float32)[:1], alone)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="same width"):
        activate(make.normal(1, 2, 7), "swiglu", torch.float32)
    with pytest.raises(ValueError, match="'relu'"):
        activate(make.normal(1, 2, 8), "relu", torch.float32)
