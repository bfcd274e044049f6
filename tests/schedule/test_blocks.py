"""The block manager: every block is free or owned, and a freed one is reported once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from motet.runtime.schedule.blocks import BlockManager


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
    blocks.retain(table)
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
        blocks.retain(table)


@pytest.mark.parametrize("tables", [[], [[0]], [[0, 1], [1]], [[0, 1, 2]]])
def test_integrity_fails_for_wrong_tables(tables):
    blocks = BlockManager(4, 8)
    assert blocks.allocate(2) == [0, 1]
    blocks.check_integrity([[0], [1]])
    with pytest.raises(AssertionError):
        blocks.check_integrity(tables)


def test_full_blocks_stay_until_they_are_needed():
    """The least recently used goes first, of one table the last block; what is shared again is used again."""
    blocks = BlockManager(4, 8)
    table = blocks.allocate(3)
    for block, digest in zip(table, (b"1", b"2", b"3"), strict=True):
        blocks.publish(block, digest, {0})
    blocks.free(table)
    assert (blocks.num_free, blocks.take_freed()) == (4, [])
    assert blocks.find([b"1", b"2", b"3", b"4"], {0}) == table
    assert blocks.find([b"2", b"4", b"3"], {0}) == table[1:2]
    assert blocks.find([b"1"], {0, 1}) == []
    blocks.retain(table[:1])
    assert blocks.can_allocate(3)
    assert not blocks.can_allocate(3, table[1:2])
    taken = blocks.allocate(2)
    assert blocks.take_freed() == [table[2]] == taken[1:]
    blocks.check_integrity([table[:1], taken])
    assert blocks.find([b"1", b"2", b"3"], {0}) == table[:2]


def test_content_is_indexed_once_and_for_most_members():
    blocks = BlockManager(4, 8)
    few, same, more = blocks.allocate(3)
    for block, members in ((few, {0}), (same, {0}), (more, {0, 1})):
        blocks.publish(block, b"1", members)
    blocks.check_integrity([[few, same, more]])
    assert (blocks.find([b"1"], {0}), blocks.find([b"1"], {1})) == ([few], [more])
    blocks.free([few, same])
    assert blocks.take_freed() == [same]
    blocks.forget([few, more])
    assert blocks.find([b"1"], {0}) == []
    assert blocks.take_freed() == [few]
    blocks.check_integrity([[more]])


@given(
    st.lists(st.tuples(st.sampled_from(["allocate", "free", "share", "publish", "find", "forget"]), st.integers(0, 7)))
)
def test_any_order_of_calls_keeps_the_count(calls):
    """Against a model: what a block holds is what was published last, and it is found only while that is so."""
    blocks, tables = BlockManager(8, 4), []
    held = {}  # block → digest, as long as nobody was given the block anew
    for name, number in calls:
        digest = bytes([number])
        if name == "allocate" and blocks.can_allocate(number):
            tables.append(blocks.allocate(number))
            assert not set(tables[-1]) & {b for table in tables[:-1] for b in table}
            for block in tables[-1]:
                held.pop(block, None)
        elif name == "share" and tables:
            tables.append(list(tables[number % len(tables)]))
            blocks.retain(tables[-1])
        elif name == "free" and tables:
            blocks.free(tables.pop(number % len(tables)))
        elif name == "publish" and (new := [b for table in tables for b in table if b not in held]):
            blocks.publish(new[0], digest, {0})
            held[new[0]] = digest
        elif name == "find":
            found = blocks.find([digest], {0})
            assert all(held[block] == digest for block in found)
            if found and blocks.can_allocate(0, found):
                blocks.retain(found)
                tables.append(found)
        elif name == "forget":
            blocks.forget([number])
        blocks.check_integrity(tables)
        assert blocks.num_free == 8 - len({b for table in tables for b in table})


def test_a_forgotten_block_is_not_shared_again_while_it_is_used():
    blocks = BlockManager(4, 4)
    (block,) = blocks.allocate(1)
    blocks.publish(block, b"a", (0,))
    blocks.forget([block])
    blocks.publish(block, b"a", (0, 1))
    assert blocks.find([b"a"], (0,)) == []
    blocks.free([block])
    (again,) = blocks.allocate(1)
    assert again == block
    blocks.publish(again, b"b", (0,))
    assert blocks.find([b"b"], (0,)) == [block]
    blocks.check_integrity([[block]])
