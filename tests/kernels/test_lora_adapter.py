"""Grouped low-rank adapters against their oracle: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

from motet.bench.gpu import problems as make  # noqa: E402
from motet.kernels.oracle import eager  # noqa: E402
from motet.kernels.triton.lora_adapter import SPLIT_K, add_adapter  # noqa: E402

TOLERANCE = {torch.float32: (1.5e-5, 3e-5), torch.bfloat16: (5e-2, 3e-2), torch.float16: (6e-3, 4e-3)}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("rank", "n", "k"),
    [(1, 5, 32), (8, 130, 96), (20, 64, 300), pytest.param(3, 20, 2 * SPLIT_K + 40, marks=pytest.mark.slow)],
)
def test_against_the_oracle(rank, n, k, dtype):
    adapters = [1, -1, 0, 2, 1, *[2] * 20]  # a row without, a tile of one adapter that is more than full
    weight = make.adapter_weight(3, rank, n, k, dtype)
    x = make.normal(len(adapters), k, seed=5, dtype=dtype)
    found = make.normal(2, len(adapters), n, seed=6)
    expected = found.clone()
    before = found.clone()
    eager.add_adapter(x, weight, make.adapter_tiles(adapters), expected)
    add_adapter(x, weight, make.adapter_tiles(adapters), found)
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)
    assert torch.equal(found[0, 1], before[0, 1])  # a row without an adapter, and the other parts, are left
    assert torch.equal(found[1], before[1])


def test_empty_tiles_are_no_work():
    weight, x, parts = make.adapter_weight(2, 4, 8, 16), make.normal(3, 16), make.normal(1, 3, 8)
    before = parts.clone()
    empty = type(make.adapter_tiles([0]))(make.integers([-1] * 32), make.integers([-1, -1]))
    add_adapter(x, weight, empty, parts)
    assert torch.equal(parts, before)


@pytest.mark.parametrize("k", [64, SPLIT_K + 64])
def test_batch_invariance(k):
    weight, x = make.adapter_weight(2, 8, 40, k), make.normal(6, k)
    together, alone = torch.zeros(1, 6, 40, device=make.DEVICE), torch.zeros(1, 1, 40, device=make.DEVICE)
    add_adapter(x, weight, make.adapter_tiles([1, 0, 1, 1, -1, 0]), together)
    add_adapter(x[:1].contiguous(), weight, make.adapter_tiles([1]), alone)
    assert torch.equal(alone[0, 0], together[0, 0])


def test_wrong_arguments_are_refused():
    weight, tiles = make.adapter_weight(2, 4, 8, 16), make.adapter_tiles([0, 1])
    with pytest.raises(ValueError, match="a must be"):
        add_adapter(make.normal(2, 15), weight, tiles, make.normal(1, 2, 8))
    with pytest.raises(ValueError, match="parts must be"):
        add_adapter(make.normal(2, 16), weight, tiles, make.normal(1, 2, 9))
