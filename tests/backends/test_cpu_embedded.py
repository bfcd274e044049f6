"""The native backend with rows that are given as embeddings."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers.models import make_adapter, make_tail
from helpers.native import ISAS, cpu_backend, tokens_of
from motet.export.bundle_writer import export_bundle
from motet.kernels.native.model import PackedBatch
from motet.runtime.errors import MotetError
from motet.runtime.model.bundle import WEIGHTS, Bundle
from motet.runtime.model.layout import EMBEDDING, POSITIONS
from motet.runtime.model.stored import read_tensor, stored_tensors

pytestmark = pytest.mark.native
LENGTH, HOLES = 70, np.r_[3:20, 40, 64:70]


def table(path, name):
    with (path / WEIGHTS).open("rb") as file:
        return read_tensor(file, path / WEIGHTS, stored_tensors(path / WEIGHTS)[name])


def packed(token_ids, first, last, outputs, *, embedded=None, members=None, given=None):
    """Rows first…last - 1 of a sequence in the first blocks. `embedded`: the embeddings at `HOLES`; `given`: rows and values."""
    own = np.arange(first, last)
    batch = {
        "token_ids": token_ids[first:last],
        "positions": own.astype(np.int32),
        "slot_mapping": own,
        "cu_seqlens": np.array([0, len(own)], np.int32),
        "context_lens": np.array([last], np.int32),
        "block_tables": np.arange(3, dtype=np.int32)[None],
        "trunk_cached": np.zeros(1, np.bool_),
        "members": members,
        "outputs": outputs,
        "freed_blocks": np.empty(0, np.int32),
    }
    if embedded is not None:
        inside = [index for index, place in enumerate(HOLES) if first <= place < last]
        batch["embedded"] = (np.array([HOLES[i] - first for i in inside], np.int32), embedded[inside])
    if given is not None:
        batch["embedded"] = given
    return PackedBatch(**batch)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_given_row_is_the_token_whose_embedding_it_is(bundle_of, family, isa):
    """With the embeddings of the tokens themselves, other ids at their places change no bit."""
    path = bundle_of(family, bits=32)
    model = cpu_backend(path, isa=isa, threads=1)._model
    token_ids = tokens_of(LENGTH)
    outputs = [(0, row) for row in range(LENGTH)]
    expected = model.step(packed(token_ids, 0, LENGTH, outputs))
    holes = token_ids.copy()
    holes[HOLES] = 7
    given = table(path, EMBEDDING)[token_ids[HOLES]]
    assert np.array_equal(model.step(packed(holes, 0, LENGTH, outputs, embedded=given)), expected)
    assert not np.array_equal(model.step(packed(holes, 0, LENGTH, outputs)), expected)
    assert POSITIONS in stored_tensors(path / WEIGHTS) or family == "llama", (
        "learned positions are added to given rows too"
    )


@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_where_a_span_is_cut(bundle_of, isa):
    model = cpu_backend(bundle_of("llama"), isa=isa)._model
    token_ids, random = tokens_of(LENGTH, 1), np.random.default_rng(2)
    given = random.standard_normal((len(HOLES), 64)).astype(np.float32)
    outputs = [(0, row) for row in range(LENGTH)]
    whole = model.step(packed(token_ids, 0, LENGTH, outputs, embedded=given))
    for seed in range(4):
        cuts = [0, *sorted(np.random.default_rng(seed).choice(np.arange(1, LENGTH), 5, replace=False)), LENGTH]
        pieces = [
            model.step(packed(token_ids, a, b, [(0, row) for row in range(b - a)], embedded=given))
            for a, b in pairwise(cuts)
        ]
        assert np.array_equal(np.concatenate(pieces), whole)


def test_given_rows_enter_below_the_trunk_of_all_members(tmp_path, tiny_model_dir):
    """Tails and adapters over one trunk: each member's rows are those of tokens with these embeddings."""
    model_dir = tiny_model_dir("llama")
    tail, lora = make_tail(model_dir, tmp_path / "t", "t", 1, 0.3), make_adapter(model_dir, tmp_path / "l", 2, layers=2)
    export_bundle(model_dir, tmp_path / "b", tails={"t": tail, "base": None}, loras={"l": lora}, bits=32, graphs=False)
    names = Bundle.load(tmp_path / "b").members
    model = cpu_backend(tmp_path / "b")._model
    token_ids = tokens_of(LENGTH, 3)
    holes = token_ids.copy()
    holes[HOLES] = 7
    given = table(tmp_path / "b", EMBEDDING)[token_ids[HOLES]]
    outputs = [(member, row) for member in range(len(names)) for row in range(LENGTH)]
    seqs = [[0]] * len(names)
    expected = model.step(packed(token_ids, 0, LENGTH, outputs, members=seqs))
    found = model.step(packed(holes, 0, LENGTH, outputs, members=seqs, embedded=given))
    assert np.array_equal(found, expected)
    assert not np.array_equal(expected[:LENGTH], expected[LENGTH : 2 * LENGTH])


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([3, 3], (2, 64), "not ascending rows"),
        ([5, 4], (2, 64), "not ascending rows"),
        ([-1], (1, 64), "not ascending rows"),
        ([LENGTH], (1, 64), "not ascending rows"),
        (list(range(LENGTH)) + [2**30], (LENGTH + 1, 64), "more rows are embedded"),
        ([3], (1, 63), "63 elements, the model's 64"),
        ([3], (2, 64), "inconsistent lengths"),
        ([3], (64,), "inconsistent lengths"),
    ],
)
def test_rows_that_do_not_fit_the_batch_are_refused(bundle_of, rows, values, message):
    model = cpu_backend(bundle_of("llama"))._model
    token_ids = tokens_of(LENGTH)
    expected = model.step(packed(token_ids, 0, LENGTH, [(0, LENGTH - 1)]))

    given = np.array(rows, np.int32), np.zeros(values, np.float32)
    with pytest.raises(MotetError, match=message):
        model.step(packed(token_ids, 0, LENGTH, [(0, LENGTH - 1)], given=given))
    assert np.array_equal(model.step(packed(token_ids, 0, LENGTH, [(0, LENGTH - 1)])), expected)
