"""Head norm, rotary and KV write against their oracle: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

from motet.bench.gpu import problems as make  # noqa: E402
from motet.kernels.oracle import eager  # noqa: E402
from motet.kernels.oracle.operands import LayerCache  # noqa: E402
from motet.kernels.triton.rotary_write import rotary_write  # noqa: E402

BLOCK = 4
CACHES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
# One step of what is stored: a value falls to the neighbour where a product was rounded otherwise, and the interpreter cuts
# where a GPU rounds.
ONE_STEP = {
    torch.float32: {"atol": 2e-6, "rtol": 2e-6},
    torch.bfloat16: {"atol": 1e-6, "rtol": 2.0**-7},
    torch.int8: {"atol": 1.0, "rtol": 1e-5},
    torch.float8_e4m3fn: {"atol": 2.0**-9, "rtol": 2.0**-3},
}
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (1e-3, 8e-3), torch.float16: (1e-4, 1e-3)}


def arguments(*, heads=4, kv_heads=2, size=16, splits=2, rows=3, rotary=True, part=1.0, norm=False, seed=0):
    half = int(size * part) // 2
    tables = (make.normal(64, half, seed=1), make.normal(64, half, seed=2)) if rotary else None
    norms = (make.normal(size, seed=3), make.normal(size, seed=4)) if norm else None
    qkv = make.normal(splits, rows, (heads + 2 * kv_heads) * size, seed=seed)
    positions = make.integers([7, 0, 63, 5, 6][:rows])
    slots = make.integers([9, 3, 0, 17, 18][:rows])
    return qkv, tables, norms, 1e-5, positions, slots, heads


def run(function, cache, dtype, qkv, tables, norms, eps, positions, slots, heads):
    return function(qkv, tables, norms, eps, positions, slots, cache, heads, dtype)


def tensors(cache: LayerCache):
    return [t for t in (cache.keys, cache.values, cache.key_scales, cache.value_scales) if t is not None]


@pytest.mark.parametrize("kind", CACHES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 6, "kv_heads": 3, "size": 20, "norm": True},
        {"heads": 6, "kv_heads": 3, "size": 20, "norm": True, "part": 0.4},
        {"size": 16, "part": 0.75},
        {"heads": 2, "kv_heads": 2, "size": 2, "splits": 1, "rotary": False},
    ],
    ids=str,
)
def test_against_the_oracle(kind, shape):
    given = arguments(**shape)
    kv_heads, size = shape.get("kv_heads", 2), shape.get("size", 16)
    caches = [make.cache(5, kv_heads, BLOCK, size, kind, fill=False) for _ in range(2)]
    expected = run(eager.rotary_write, caches[0], torch.float32, *given)
    found = run(rotary_write, caches[1], torch.float32, *given)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
    for a, b in zip(tensors(caches[1]), tensors(caches[0]), strict=True):
        a, b = a.float(), b.float()
        written = ~b.isnan()
        assert torch.equal(a.isnan(), b.isnan())  # the slots of these rows and no others
        if make.INTERPRETED and kind is torch.float8_e4m3fn:
            # The interpreter loses the carry of a value that rounds up to a power of two: 127 becomes 64, not 128.
            written &= torch.frexp(b.nan_to_num())[0].abs() != 0.5
        torch.testing.assert_close(a[written], b[written], **ONE_STEP[kind])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_dtypes_of_queries(dtype):
    given = arguments(norm=True)
    caches = [make.cache(5, 2, BLOCK, 16, torch.float32) for _ in range(2)]
    atol, rtol = TOLERANCE[dtype]
    expected = run(eager.rotary_write, caches[0], dtype, *given)
    torch.testing.assert_close(run(rotary_write, caches[1], dtype, *given), expected, atol=atol, rtol=rtol)


def test_values_are_copied_exactly():
    qkv, tables, norms, eps, positions, slots, heads = arguments(splits=1)
    cache = make.cache(5, 2, BLOCK, 16, torch.float32, fill=False)
    rotary_write(qkv, tables, norms, eps, positions, slots, cache, heads, torch.float32)
    stored = cache.values[(slots // BLOCK).long(), :, (slots % BLOCK).long()]
    assert torch.equal(stored, qkv[0].unflatten(-1, (-1, 16))[:, -2:])


def test_batch_invariance():
    qkv, tables, norms, eps, positions, slots, heads = arguments(rows=5, norm=True)
    caches = [make.cache(5, 2, BLOCK, 16, torch.int8) for _ in range(2)]
    together = rotary_write(qkv, tables, norms, eps, positions, slots, caches[0], heads, torch.float32)
    one = (qkv[:, :1].contiguous(), tables, norms, eps, positions[:1], slots[:1])
    assert torch.equal(rotary_write(*one, caches[1], heads, torch.float32), together[:1])
    block, offset = int(slots[0]) // BLOCK, int(slots[0]) % BLOCK
    assert torch.equal(caches[0].keys[block, :, offset], caches[1].keys[block, :, offset])


def test_wrong_arguments_are_refused():
    given = arguments()
    cache = make.cache(5, 2, BLOCK, 16, torch.int8)
    with pytest.raises(ValueError, match="lacks its key_scales"):
        run(rotary_write, LayerCache(cache.keys, cache.values), torch.float32, *given)
    with pytest.raises(ValueError, match="positions must be"):
        run(rotary_write, cache, torch.float32, *given[:4], given[4].long(), *given[5:])
