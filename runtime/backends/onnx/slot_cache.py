"""`SlotCache`: contiguous key/value slots of one graph's layers, kept compact.

ONNX Runtime's attention on the CPU has no block table: a batch of B sequences reads slots 0…B-1 of one buffer. So a
block of the scheduler is as long as the context and lies in a *slot*, and the cache moves slots so that the sequences of
a decode step are the first ones.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


class SlotCache:
    """Keys and values of `layers`, each [num_slots, kv_heads, slot_size, head_size], and which block lies in which slot.

    The arrays are zero pages until they are written, so unused positions cost address space only.
    """

    def __init__(self, layers: Iterable[int], num_slots: int, kv_heads: int, slot_size: int, head_size: int) -> None:
        shape = (num_slots, kv_heads, slot_size, head_size)
        self.arrays: dict[str, F32] = {
            f"{layer}.{kind}": _zero_pages(shape) for layer in layers for kind in ("key", "value")
        }
        self._block_of_slot: list[int | None] = [None] * num_slots
        self._slot_of_block: dict[int, int] = {}
        self._lengths = [0] * num_slots  # positions of a slot that hold content

    def free(self, blocks: Iterable[int]) -> None:
        """Forget blocks; unknown ones (never written here) are fine."""
        for block in blocks:
            slot = self._slot_of_block.pop(block, None)
            if slot is not None:
                self._block_of_slot[slot] = None
                self._lengths[slot] = 0

    def slot(self, block: int) -> int:
        """The block's slot; a block that has none gets the first free one."""
        if block not in self._slot_of_block:
            slot = self._block_of_slot.index(None)
            self._block_of_slot[slot] = block
            self._slot_of_block[block] = slot
        return self._slot_of_block[block]

    def set_length(self, block: int, length: int) -> None:
        """After a run: the block's slot holds `length` positions."""
        self._lengths[self._slot_of_block[block]] = length

    def compact(self, blocks: Sequence[int]) -> list[int]:
        """Move slots until `blocks` fill slots 0…len(blocks)-1 exactly; return the slot of each, in order."""
        count, wanted = len(blocks), set(blocks)
        homeless = [block for block in blocks if self.slot(block) >= count]
        vacant = [slot for slot in range(count) if self._block_of_slot[slot] not in wanted]
        for block, slot in zip(homeless, vacant, strict=True):
            self._swap(self._slot_of_block[block], slot)
        return [self._slot_of_block[block] for block in blocks]

    def _swap(self, source: int, target: int) -> None:
        """Exchange two slots; only what holds content is copied."""
        length, other = self._lengths[source], self._lengths[target]
        for array in self.arrays.values():
            kept = array[target, :, :other].copy()
            array[target, :, :length] = array[source, :, :length]
            array[source, :, :other] = kept
        self._lengths[source], self._lengths[target] = other, length
        blocks = self._block_of_slot
        blocks[source], blocks[target] = blocks[target], blocks[source]
        for slot in (source, target):
            block = blocks[slot]
            if block is not None:
                self._slot_of_block[block] = slot


def _zero_pages(shape: tuple[int, ...]) -> F32:
    """Zeros that take memory page by page as they are written. Huge pages would zero (and keep) 2 MiB for the first
    position of every head: a quarter of a second for the first prompt in a slot."""
    pages = mmap.mmap(-1, max(1, 4 * math.prod(shape)))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.float32, math.prod(shape)).reshape(shape)
