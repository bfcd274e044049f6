"""The block manager: every block is free or owned, and a freed one is reported once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from motet.runtime.blocks import BlockManager


def test_blocks_hold_positions():
    blocks = BlockManager(4, 8)
    assert [blocks.blocks_for(n) for n in (0, 1, 8, 9, 32)] == [0, 1, 1, 2, 4]


def test_allocate_and_free():
    blocks = BlockManager(3, 8)
    first, second = blocks.allocate(2), blocks.allocate(1)
    assert len({*first, *second}) == 3
    assert not blocks.can_allocate(1)
    assert blocks.can_allocate(0)
    blocks.free(first)
    assert blocks.num_free == 2
    assert sorted(blocks.take_freed()) == sorted(first)
    assert blocks.take_freed() == []
    blocks.check_integrity([second])


def test_a_shared_block_is_freed_by_its_last_owner():
    blocks = BlockManager(2, 8)
    table = blocks.allocate(1)
    blocks.share(table)
    blocks.check_integrity([table, table])
    blocks.free(table)
    assert blocks.num_free == 1
    assert blocks.take_freed() == []
    blocks.free(table)
    assert blocks.num_free == 2
    assert blocks.take_freed() == table


def test_misuse_is_noticed():
    blocks = BlockManager(2, 8)
    table = blocks.allocate(2)
    with pytest.raises(AssertionError, match="1 blocks wanted, 0 free"):
        blocks.allocate(1)
    blocks.free(table)
    with pytest.raises(KeyError):
        blocks.free(table)
    with pytest.raises(KeyError):
        blocks.share(table)


@pytest.mark.parametrize("tables", [[], [[0]], [[0, 1], [1]], [[0, 1, 2]]])
def test_integrity_fails_for_wrong_tables(tables):
    blocks = BlockManager(4, 8)
    assert blocks.allocate(2) == [0, 1]
    blocks.check_integrity([[0], [1]])
    with pytest.raises(AssertionError):
        blocks.check_integrity(tables)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "free", "share"]), st.integers(0, 5))))
def test_any_order_of_calls_keeps_the_count(calls):
    blocks, tables, freed = BlockManager(8, 4), [], []
    for name, number in calls:
        if name == "allocate" and blocks.can_allocate(number):
            tables.append(blocks.allocate(number))
        elif name == "share" and tables:
            tables.append(tables[number % len(tables)])
            blocks.share(tables[-1])
        elif name == "free" and tables:
            before = blocks.num_free
            blocks.free(tables.pop(number % len(tables)))
            freed += [None] * (blocks.num_free - before)
        blocks.check_integrity(tables)
    assert len(blocks.take_freed()) == len(freed)
