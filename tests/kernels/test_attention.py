"""Paged decode and prefill attention against their oracle: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

from motet.bench.gpu import problems as make  # noqa: E402
from motet.kernels.oracle import eager  # noqa: E402
from motet.kernels.oracle.operands import DecodeRows, LayerCache, Scores  # noqa: E402
from motet.kernels.triton.paged_attention import SEGMENTS, SPLIT, decode_attention, num_segments  # noqa: E402
from motet.kernels.triton.prefill_attention import prefill_attention  # noqa: E402

pytestmark = pytest.mark.slow  # Triton's interpreter loops over blocks in Python
# By the dtype of queries and probabilities: the kernel rounds probabilities to it, the oracle does not.
TOLERANCE = {torch.float32: (4e-6, 2e-5), torch.bfloat16: (8e-3, 2e-2), torch.float16: (1e-3, 2e-3)}
CACHES = [torch.bfloat16, torch.int8, torch.float8_e4m3fn]
SHAPES = [(4, 2, 16, 4), (3, 3, 20, 1), (9, 3, 64, 16), (16, 1, 8, 32)]  # heads, kv_heads, head size, block size


def poisoned(cache, tables, lengths):
    """NaN wherever no sequence has content: what lies behind a length must not be read."""
    keep = torch.zeros(cache.keys.shape[:3], dtype=torch.bool, device=cache.keys.device)
    size = cache.block_size
    for table, length in zip(tables.tolist(), lengths):
        for place in range(length):
            keep[table[place // size], :, place % size] = True
    for tensor in (cache.keys, cache.values):
        tensor[~keep] = float("nan")
    return cache


def test_tolerances_cover_the_dtypes():
    assert set(TOLERANCE) == {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize(("heads", "kv_heads", "size", "block"), SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_decode(heads, kv_heads, size, block, dtype):
    lengths = [1, SPLIT, SPLIT + 1, 2 * SPLIT + 37]
    width = -(-max(lengths) // block)
    tables = make.tables(4, width, 4 * width)
    cache = poisoned(make.cache(4 * width, kv_heads, block, size, dtype), tables, lengths)
    query = make.normal(4, heads, size, seed=9, dtype=dtype)
    rows = make.decode_rows(lengths, tables, width * block)
    expected, found = (torch.full_like(query, 7.0) for _ in range(2))
    eager.decode_attention(query, cache, rows, expected)
    decode_attention(query, cache, rows, found)
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("kind", CACHES, ids=str)
def test_quantised_caches(kind):
    lengths = [9, 40]
    tables = make.tables(2, 10, 20)
    cache = make.cache(20, 2, 4, 16, kind)
    query = make.normal(12, 4, 16, seed=3)
    found, expected = torch.zeros_like(query), torch.zeros_like(query)
    for function, out in ((eager, expected), (None, found)):
        decode = eager.decode_attention if function else decode_attention
        prefill = eager.prefill_attention if function else prefill_attention
        decode(query, cache, make.decode_rows(lengths, tables, 40), out)
        chunks = make.chunks([2, 10], lengths, tables)
        prefill(query, cache, chunks, out)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=2e-5)


WINDOWS = [1, 5, 64, 100, SPLIT, 200, 1000]


def forgotten(cache, tables, counts):
    """A copy with NaN in the first `counts` positions of each sequence."""
    keys, values = cache.keys.clone(), cache.values.clone()
    for table, count in zip(tables.tolist(), counts):
        for place in range(count):
            for tensor in (keys, values):
                tensor[table[place // cache.block_size], :, place % cache.block_size] = float("nan")
    return LayerCache(keys, values)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_oracle_over_a_window_is_a_softmax_over_the_last_positions(window):
    length = SPLIT + 37
    tables = make.tables(1, 50, 50)
    cache, query = make.cache(50, 2, 4, 16, torch.float32), make.normal(1, 4, 16, seed=9)
    found = torch.zeros_like(query)
    eager.decode_attention(query, cache, make.decode_rows([length], tables, 200), found, Scores(window))
    places = torch.arange(max(0, length - window), length)
    keys, values = (t.cpu()[tables[0].long().cpu()[places // 4], :, places % 4] for t in (cache.keys, cache.values))
    scores = torch.einsum("hgd,phd->hgp", query.cpu().reshape(2, 2, 16), keys) * 16**-0.5
    expected = torch.einsum("hgp,phd->hgd", scores.softmax(-1), values).reshape(1, 4, 16)
    torch.testing.assert_close(found.cpu(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"scale": 0.7}, {"softcap": 0.4}], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_attention_over_a_window(window, how):
    """Decode rows and chunks as the oracle; whole tiles before a window are not read: they may hold NaN."""
    scores = Scores(window, **how)
    lengths, sizes = [1, 7, SPLIT, SPLIT + 1, 3 * SPLIT + 37], [1, 7, 30, 1, 99]
    width = -(-max(lengths) // 8)
    tables = make.tables(5, width, 5 * width)
    cache = make.cache(5 * width, 2, 8, 16, torch.float32)
    query = make.normal(sum(sizes), 4, 16, seed=9)
    rows, chunks = make.decode_rows(lengths, tables, width * 8), make.chunks(sizes, lengths, tables)
    for name, work, seen in (("decode_attention", rows, [1] * 5), ("prefill_attention", chunks, sizes)):
        unread = [max(0, length - count + 1 - window) // 64 * 64 for length, count in zip(lengths, seen)]
        own = forgotten(poisoned(cache, tables, lengths), tables, unread)
        found, expected = torch.zeros_like(query), torch.zeros_like(query)
        getattr(eager, name)(query, cache, work, expected, scores)
        {"decode_attention": decode_attention, "prefill_attention": prefill_attention}[name](
            query, own, work, found, scores
        )
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "size", "block"), SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_prefill(heads, kv_heads, size, block, dtype):
    sizes, lengths = [11, 1, 37], [11, 30, 70]  # a whole prompt, one row, a chunk after a prefix
    width = -(-max(lengths) // block)
    tables = make.tables(3, width, 3 * width)
    cache = poisoned(make.cache(3 * width, kv_heads, block, size, dtype), tables, lengths)
    query = make.normal(sum(sizes) + 2, heads, size, seed=4, dtype=dtype)
    chunks = make.chunks(sizes, lengths, tables)
    expected, found = (torch.full_like(query, 7.0) for _ in range(2))
    eager.prefill_attention(query, cache, chunks, expected)
    prefill_attention(query, cache, chunks, found)
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)
    assert (found[-2:] == 7).all()  # rows of no chunk are left


def test_padded_rows_are_zero_and_others_are_left():
    cache, tables = make.cache(4, 1, 4, 16, torch.float32), make.tables(1, 4, 4)
    query, out = make.normal(3, 2, 16), torch.full((3, 2, 16), 7.0, device=make.DEVICE)
    rows = DecodeRows(make.integers([2, 0]), make.integers([0, 0]), make.integers([5, 0]), tables, 16)
    decode_attention(query, cache, rows, out)
    assert (out[0] == 0).all()
    assert (out[1] == 7).all()
    assert (out[2] != 7).all()


@pytest.mark.parametrize("window", [None, 40, 140])
def test_decode_batch_invariance(window):
    """A row alone, in a batch, under another longest length, and as one of several rows of its sequence: the same bits."""
    scores = Scores(window)
    cache, tables = make.cache(200, 2, 4, 16, torch.float32), make.tables(3, 60, 200)
    query = make.normal(3, 4, 16)
    together, alone, drafted = (torch.zeros_like(query) for _ in range(3))
    decode_attention(query, cache, make.decode_rows([150, 20, 230], tables, 240), together, scores)
    one = DecodeRows(make.integers([0]), make.integers([0]), make.integers([150]), tables, 152)
    decode_attention(query, cache, one, alone, scores)
    rows = DecodeRows(make.integers([0, 1, 2]), make.integers([0, 0, 0]), make.integers([150, 151, 152]), tables, 240)
    decode_attention(query, cache, rows, drafted, scores)
    assert torch.equal(alone[0], together[0])
    assert torch.equal(drafted[0], together[0])


def test_the_launch_does_not_grow_with_the_longest_context():
    assert [num_segments(n) for n in (1, SPLIT, SPLIT + 1, SEGMENTS * SPLIT, 131072)] == [1, 1, 2, SEGMENTS, SEGMENTS]


@pytest.mark.parametrize("window", [None, 2500, 90])
def test_rows_longer_than_their_segments_are_computed_in_larger_ones(window):
    """As the oracle; and with the same bits beside short rows and alone, in launches of other sizes."""
    lengths = [SEGMENTS * SPLIT + 700, SEGMENTS * SPLIT + 1, 130]
    scores = Scores(window)
    tables = make.tables(3, 90, 270)
    cache, query = make.cache(270, 1, 32, 16, torch.float32), make.normal(3, 2, 16, seed=9)
    expected, found, alone = (torch.zeros_like(query) for _ in range(3))
    eager.decode_attention(query, cache, make.decode_rows(lengths, tables, 2880), expected, scores)
    decode_attention(query, cache, make.decode_rows(lengths, tables, 2880), found, scores)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    for row, length in enumerate(lengths):
        rows = DecodeRows(*(make.integers([i]) for i in (row, row, length)), tables, length)
        decode_attention(query, cache, rows, alone, scores)
    assert torch.equal(alone, found)


@pytest.mark.parametrize("window", [None, 15])
def test_prefill_batch_invariance(window):
    scores = Scores(window)
    cache, tables = make.cache(40, 2, 4, 16, torch.float32), make.tables(2, 20, 40)
    query = make.normal(50, 4, 16)
    together, alone = torch.zeros_like(query), torch.zeros_like(query)
    prefill_attention(query, cache, make.chunks([20, 30], [40, 70], tables), together, scores)
    prefill_attention(query, cache, make.chunks([20], [40], tables), alone, scores)
    assert torch.equal(alone[:20], together[:20])


def test_wrong_arguments_are_refused():
    cache, tables = make.cache(4, 2, 4, 16, torch.float32), make.tables(1, 4, 4)
    rows = make.decode_rows([3], tables, 16)
    query = make.normal(1, 3, 16)
    with pytest.raises(ValueError, match="do not divide"):
        decode_attention(query, cache, rows, torch.empty_like(query))
    query = make.normal(1, 4, 16)
    with pytest.raises(ValueError, match="out must be"):
        decode_attention(query, cache, rows, torch.empty_like(query).half())
