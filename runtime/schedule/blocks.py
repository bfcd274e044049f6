"""`BlockManager`: which blocks of the KV cache are used, idle or empty. It handles counts, ids and digests, not
tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .prefix import PrefixIndex


class BlockManager:
    """`num_blocks` blocks of `block_size` positions.

    A block is used (sequences refer to it), idle (nothing refers to it, but its content can still be shared) or
    empty. Idle blocks count as free, and the least recently used is taken first. A block whose content dies is
    reported once by `take_freed`. `stale`: the blocks hold what an earlier manager put there, which is dead.
    """

    def __init__(self, num_blocks: int, block_size: int, *, stale: bool = False) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._empty = list(range(num_blocks))[::-1]  # the last one freed is reused first: its memory may be cached
        self._idle: dict[int, None] = {}  # in the order in which they became idle
        self._owners: dict[int, int] = {}  # used block → reference count
        self._prefixes = PrefixIndex()
        self._freed: list[int] = list(range(num_blocks)) if stale else []
        self._distrusted: set[int] = set()  # used blocks that were forgotten: not shared again until they are freed

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._idle)

    def blocks_for(self, positions: int) -> int:
        """Blocks that hold this many positions."""
        return -(-positions // self.block_size)

    def can_allocate(self, count: int, shared: Iterable[int] = ()) -> bool:
        """Whether `count` blocks are free beside those of `shared`, which may be idle."""
        return count + len(self._idle.keys() & set(shared)) <= self.num_free

    def allocate(self, count: int) -> list[int]:
        assert self.can_allocate(count), f"{count} blocks wanted, {self.num_free} free"
        blocks = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        self._owners.update(dict.fromkeys(blocks, 1))
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block, used or idle. A block is free again when all its references were freed."""
        for block in blocks:
            if block in self._idle:
                del self._idle[block]
                self._owners[block] = 1
            else:
                self._owners[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block, last block first: a cached block can be found only through the ones before it, so
        the tail should be evicted first."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block] == 0:
                del self._owners[block]
                self._distrusted.discard(block)
                if block in self._prefixes:
                    self._idle[block] = None
                else:
                    self._give_back(block)

    def count_freed(self, blocks: Iterable[int]) -> int:
        """Blocks that nothing refers to once these references, one each, are dropped."""
        return sum(self._owners[block] == count for block, count in Counter(blocks).items())

    def publish(self, block: int, digest: bytes, members: Iterable[int]) -> None:
        """A used block is full and can be shared from now on. `members`: those whose tails ran over it."""
        assert block in self._owners
        if block not in self._distrusted:
            self._prefixes.add(block, digest, members)

    def members_of(self, block: int) -> frozenset[int]:
        """Members whose tails ran over a block that can be shared; empty for any other block."""
        return self._prefixes.members_of(block)

    def find(self, digests: Iterable[bytes], members: Iterable[int], *, any_members: bool = False) -> list[int]:
        """The blocks that hold the content of these digests, for all of `members` or, with `any_members`, for the
        trunk, up to the first digest that no block has."""
        found: list[int] = []
        for digest in digests:
            block = self._prefixes.find(digest, members, any_members=any_members)
            if block is None:
                break
            found.append(block)
        return found

    def cached_digests(self) -> list[bytes]:
        """Of the blocks that can be shared. May be called from any thread."""
        return self._prefixes.digests()

    def forget(self, blocks: Iterable[int] | None = None) -> None:
        """The content of these blocks (None: of all blocks) cannot be trusted: stop sharing it."""
        chosen = range(self.num_blocks) if blocks is None else list(blocks)
        self._distrusted.update(block for block in chosen if block in self._owners)
        for block in chosen:
            if block in self._prefixes:
                self._prefixes.remove(block)
                if block in self._idle:
                    del self._idle[block]
                    self._give_back(block)

    def take_freed(self) -> list[int]:
        """Blocks whose content died since the last call; the backend may drop it."""
        freed, self._freed = self._freed, []
        return freed

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        self._prefixes.remove(block)
        self._freed.append(block)
        return block

    def _give_back(self, block: int) -> None:
        self._empty.append(block)
        self._freed.append(block)

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert that each used block is in as many of `tables` as it has references, that every other block is
        either idle or empty, and that indexed blocks are used or idle."""
        owned = dict(Counter(block for table in tables for block in table))
        assert owned == self._owners, f"owners {self._owners}, in tables {owned}"
        assert sorted([*self._owners, *self._idle, *self._empty]) == list(range(self.num_blocks)), "not a partition"
        assert all(block in self._prefixes for block in self._idle), "an idle block is not indexed"
        assert not any(block in self._prefixes for block in self._empty), "an empty block is indexed"
        self._prefixes.check_integrity()
