"""`BlockManager`: which blocks of the KV cache are used, idle or empty. It knows counts, ids and digests, no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .prefix import PrefixIndex


class BlockManager:
    """`num_blocks` blocks of `block_size` positions.

    A block is used (it has owners), idle (free, but its content may still be shared: the least recently used one goes
    first) or empty. Idle blocks count as free. A block whose content is dead is reported once by `take_freed`.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._empty = list(range(num_blocks))[::-1]  # the last one freed is taken first: its memory is at hand
        self._idle: dict[int, None] = {}  # in the order in which they became idle
        self._owners: dict[int, int] = {}  # used block → reference count
        self._prefixes = PrefixIndex()
        self._freed: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._idle)

    def blocks_for(self, positions: int) -> int:
        """Blocks that hold this many positions."""
        return -(-positions // self.block_size)

    def can_allocate(self, count: int, shared: Iterable[int] = ()) -> bool:
        """Are there `count` blocks, when those of `shared` are taken too?"""
        return count + len(self._idle.keys() & set(shared)) <= self.num_free

    def allocate(self, count: int) -> list[int]:
        assert self.can_allocate(count), f"{count} blocks wanted, {self.num_free} free"
        blocks = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        self._owners.update(dict.fromkeys(blocks, 1))
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One owner more for blocks that are used or idle; a block is free again when its last owner has freed it."""
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
                if block in self._prefixes:
                    self._idle[block] = None
                else:
                    self._give_back(block)

    def publish(self, block: int, digest: bytes, members: Iterable[int]) -> None:
        """A used block is full, and may be shared from now on."""
        assert block in self._owners
        self._prefixes.add(block, digest, members)

    def find(self, digests: Iterable[bytes], members: Iterable[int]) -> list[int]:
        """The blocks that hold the content of these digests, up to the first that none holds."""
        found: list[int] = []
        for digest in digests:
            block = self._prefixes.find(digest, members)
            if block is None:
                break
            found.append(block)
        return found

    def forget(self, blocks: Iterable[int] | None = None) -> None:
        """What these blocks hold (None: all) cannot be trusted: it is not shared any more."""
        for block in range(self.num_blocks) if blocks is None else blocks:
            if block in self._prefixes:
                self._prefixes.remove(block)
                if block in self._idle:
                    del self._idle[block]
                    self._give_back(block)

    def take_freed(self) -> list[int]:
        """Blocks whose content died since the last call: the backend may forget what they hold."""
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
        """Assert that each used block is in as many of `tables` as it has owners, that all others are idle or empty, once,
        and that what is indexed is used or idle."""
        owned = dict(Counter(block for table in tables for block in table))
        assert owned == self._owners, f"owners {self._owners}, in tables {owned}"
        assert sorted([*self._owners, *self._idle, *self._empty]) == list(range(self.num_blocks)), "not a partition"
        assert all(block in self._prefixes for block in self._idle), "an idle block is not indexed"
        assert not any(block in self._prefixes for block in self._empty), "an empty block is indexed"
        self._prefixes.check_integrity()
