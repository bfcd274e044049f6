"""The host side of a torch step: rows, tiles, packed uploads, the ladder of captured sizes."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend's own parts")

from motet.runtime.api.request import Space  # noqa: E402
from motet.runtime.backends.torch.cuda_graphs import ladder  # noqa: E402
from motet.runtime.backends.torch.packed import Packed  # noqa: E402
from motet.runtime.backends.torch.row_plan import plan_rows  # noqa: E402
from motet.runtime.schedule.batch import Batch, ResolvedSampling, SampleRow  # noqa: E402


def sample(row):
    return SampleRow(((row, 0, 1.0),), Space.LOGITS, ResolvedSampling(), 1)


def batch(counts, lengths, sampled):
    """Sequences of these rows; those of `sampled` have all of theirs sampled."""
    rows = sum(counts)
    ends = np.cumsum(counts)
    drawn = [row for seq in sampled for row in range(ends[seq] - counts[seq], ends[seq])]
    return Batch(
        token_ids=np.arange(rows),
        positions=np.arange(100, 100 + rows, dtype=np.int32),
        slot_mapping=np.arange(rows),
        cu_seqlens_q=np.cumsum([0, *counts], dtype=np.int32),
        context_lens=np.array(lengths, np.int32),
        block_tables=np.zeros((len(counts), 4), np.int32),
        members=[(0,)] * len(counts),
        trunk_cached=np.zeros(len(counts), np.bool_),
        samples=[sample(int(row)) for row in drawn],
        freed_blocks=np.empty(0, np.int32),
    )


def plan(given, seqs):
    slots = given.slot_mapping.astype(np.int32)
    return plan_rows(given, np.array(seqs), slots, given.context_lens)


def test_decode_rows_drafts_and_chunks():
    given = batch([1, 3, 9], [7, 10, 9], sampled=[0, 1])
    found = plan(given, [0, 1, 2])
    assert found.arrays["rows"].tolist() == [0, 1, 2, 3]
    assert found.arrays["row_seqs"].tolist() == [0, 1, 1, 1]
    assert found.arrays["row_lengths"].tolist() == [7, 8, 9, 10]
    assert found.arrays["chunk_starts"].tolist() == [4]
    assert found.arrays["chunk_sizes"].tolist() == [9]
    assert found.arrays["chunk_lengths"].tolist() == [9]
    assert found.max_chunk == 9


def test_a_step_without_samples_is_chunks():
    found = plan(batch([1, 4], [1, 4], sampled=[]), [0, 1])
    assert found.arrays["rows"].tolist() == []
    assert found.arrays["chunk_sizes"].tolist() == [1, 4]


def test_a_subset_is_renumbered_but_keeps_its_block_tables():
    given = batch([1, 2, 12, 1], [5, 6, 20, 8], sampled=[0, 1, 3])
    found = plan(given, [1, 2, 3])
    assert found.index.tolist() == list(range(1, 16))
    assert found.arrays["positions"].tolist() == list(range(101, 116))
    assert found.arrays["rows"].tolist() == [0, 1, 14]
    assert found.arrays["row_seqs"].tolist() == [1, 1, 3]
    assert found.arrays["chunk_starts"].tolist() == [2]
    assert found.arrays["chunk_seqs"].tolist() == [2]


def test_packed_arrays_are_one_buffer():
    arrays = {
        "a": np.arange(3, dtype=np.int32),
        "b": np.empty((0, 5), np.float32),
        "c": np.array([[2**63 + 5]], np.uint64).view(np.int64),
        "d": np.ones((2, 2), np.float32),
    }
    packed = Packed.of(arrays, torch.device("cpu"))
    for name, array in arrays.items():
        assert packed.device[name].shape == array.shape
        assert np.array_equal(packed.device[name].numpy(), array)
        assert packed.device[name].data_ptr() % 4 == 0
    packed.fill({"a": np.array([9], np.int32)})
    assert packed.host["a"].tolist() == [9, 1, 2]


@pytest.mark.parametrize("largest", [1, 2, 3, 8, 9, 64, 65, 256])
def test_the_ladder_holds_the_largest_and_little_more(largest):
    rungs = ladder(largest)
    assert rungs[-1] >= largest
    assert rungs == tuple(sorted(set(rungs)))
    assert all(rung < largest for rung in rungs[:-1])
