"""`BlockManager`: which block of the KV cache belongs to whom. It knows counts and ids, no tensors."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable


class BlockManager:
    """`num_blocks` blocks of `block_size` positions. A freed block is reported once by `take_freed`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(num_blocks))
        self._owners: dict[int, int] = {}  # used block → reference count
        self._freed: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, positions: int) -> int:
        """Blocks that hold this many positions."""
        return -(-positions // self.block_size)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        assert self.can_allocate(count), f"{count} blocks wanted, {len(self._free)} free"
        blocks = [self._free.popleft() for _ in range(count)]
        self._owners.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One owner more for blocks in use; a block is free again when its last owner has freed it."""
        for block in blocks:
            self._owners[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._owners[block] -= 1
            if self._owners[block] == 0:
                del self._owners[block]
                self._free.append(block)
                self._freed.append(block)

    def take_freed(self) -> list[int]:
        """Blocks freed since the last call: the backend may forget what they hold."""
        freed, self._freed = self._freed, []
        return freed

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert that each used block is in as many of `tables` as it has owners, and that all others are free once."""
        owned = dict(Counter(block for table in tables for block in table))
        assert owned == self._owners, f"owners {self._owners}, in tables {owned}"
        assert self._owners.keys().isdisjoint(self._free), "a block is free and used"
        assert len(self._owners) + len(set(self._free)) == len(self._owners) + len(self._free) == self.num_blocks
