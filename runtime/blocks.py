"""`BlockManager`: which block of the KV cache belongs to whom. It knows counts and ids, no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class BlockManager:
    """`num_blocks` blocks of `block_size` positions. A freed block is reported once by `take_freed`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(num_blocks))
        self._used: set[int] = set()
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
        self._used.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._used.remove(block)
            self._free.append(block)
            self._freed.append(block)

    def take_freed(self) -> list[int]:
        """Blocks freed since the last call: the backend may forget what they hold."""
        freed, self._freed = self._freed, []
        return freed

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert that the used blocks are exactly those of `tables`, each once, and the others are free."""
        owned = [block for table in tables for block in table]
        assert len(owned) == len(set(owned)), "a block belongs to two sequences"
        assert set(owned) == self._used, f"used {sorted(self._used)}, owned {sorted(owned)}"
        assert self._used.isdisjoint(self._free) and len(self._used) + len(self._free) == self.num_blocks
