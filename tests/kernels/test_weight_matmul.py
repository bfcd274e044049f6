"""Dense, 8-bit and 4-bit matmul against their oracle: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

from motet.bench.gpu import problems as make  # noqa: E402
from motet.export.quantisation.groups import dequantise, quantise  # noqa: E402
from motet.kernels.oracle import eager  # noqa: E402
from motet.kernels.oracle.operands import LinearWeight  # noqa: E402
from motet.kernels.triton.weight_matmul import BLOCK_N, PROGRAMS, matmul, num_splits  # noqa: E402

pytestmark = pytest.mark.slow  # Triton's interpreter, or many steps through torch

# By the dtype of x: weights are rounded to it before the product, sums are float32; M > 64 rounds the result too.
TOLERANCE = {torch.float32: (1.5e-5, 3e-5), torch.bfloat16: (3e-2, 2e-2), torch.float16: (3e-3, 3e-3)}


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "group"),
    [(1, 1, 32, 32), (3, 100, 64, 16), (17, 70, 576, 64), (64, 65, 1024, 128), (70, 130, 96, 32)],
)
def test_against_the_oracle(m, n, k, group, dtype, bits):
    weight = make.weight(n, k, bits, group_size=group, dtype=dtype, bias=n % 2 == 0)
    x = make.normal(m, k, seed=3, dtype=dtype)
    found, expected = matmul(x, weight), eager.matmul(x, weight)
    assert found.dtype == (torch.float32 if m <= 64 else dtype)
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(found.float().sum(0), expected.float().sum(0), atol=atol, rtol=rtol)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k", [32, 96, 2048])
def test_the_oracle_reads_what_export_writes(bits, k):
    values = make.normal(5, k, seed=k).cpu().numpy()
    expected = torch.from_numpy(dequantise(quantise(values, bits, 32))).to(make.DEVICE)
    torch.testing.assert_close(eager.dequantise(make.weight(5, k, bits, seed=k)) * k**0.5, expected, atol=0.3, rtol=0.3)
    stored = quantise((make.normal(5, k, seed=k) * k**-0.5).cpu().numpy(), bits, 32)
    exact = torch.from_numpy(dequantise(stored)).to(make.DEVICE)
    torch.testing.assert_close(eager.dequantise(make.weight(5, k, bits, seed=k)), exact, atol=1e-6, rtol=1e-5)


def test_splits_fill_a_gpu_and_depend_on_the_weight_alone():
    assert num_splits(128256, 4096) == 1
    assert num_splits(4096, 4096) * 4096 // BLOCK_N >= PROGRAMS
    assert num_splits(64, 64) == 1


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_batch_invariance(bits):
    """A row alone and in any batch of up to 64: the same bits."""
    weight = make.weight(66, 2048, bits)
    x = make.normal(40, 2048)
    together = matmul(x, weight)
    assert len(together) > 1  # K is split
    for rows in (1, 5, 20):
        assert torch.equal(matmul(x[:rows].contiguous(), weight), together[:, :rows])


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_batch_invariance_above_64_rows(bits):
    """A row in any batch of more than 64, wherever it stands in it: the same bits."""
    weight = make.weight(140, 160, bits, bias=True)
    x = make.normal(150, 160)
    together = matmul(x, weight)
    assert torch.equal(matmul(x[:65].contiguous(), weight), together[:, :65])
    assert torch.equal(matmul(x[60:].contiguous(), weight), together[:, 60:])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="x must be"):
        matmul(make.normal(64, 2).t(), make.weight(8, 64, 8))
    with pytest.raises(ValueError, match="values must be"):
        matmul(make.normal(2, 64), make.weight(8, 64, 0, dtype=torch.float16))
    odd = LinearWeight(torch.zeros(4, 24, dtype=torch.uint8, device=make.DEVICE), make.normal(1, 4))
    with pytest.raises(ValueError, match="a group must have"):
        matmul(make.normal(2, 24), odd)
