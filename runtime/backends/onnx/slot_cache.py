"""`SlotCache`: the keys and values of one graph's layers in contiguous slots, kept compact.

ONNX Runtime's attention on the CPU has no block table: a batch of B sequences reads slots 0…B-1 of one buffer. So a block
of the scheduler is as long as the context and is stored in a *slot*. The cache moves slots so that the sequences of a
decode step are in the first ones.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


class SlotCache:
    """Keys and values of `layers`, each f32 [num_slots, kv_heads, slot_size, head_size], and the block in each slot.

    The arrays are zero pages until they are written, so unused positions take address space but no memory.
    """

    def __init__(self, layers: Iterable[int], num_slots: int, kv_heads: int, slot_size: int, head_size: int) -> None:
        shape = (num_slots, kv_heads, slot_size, head_size)
        self.arrays: dict[str, F32] = {
            f"{layer}.{kind}": _zero_pages(shape) for layer in layers for kind in ("key", "value")
        }
        self._block_of_slot: list[int | None] = [None] * num_slots
        self._slot_of_block: dict[int, int] = {}
        self._lengths = [0] * num_slots  # number of positions in use, for each slot

    def free(self, blocks: Iterable[int]) -> None:
        """Empty the slots of blocks. Blocks that have no slot are ignored."""
        for block in blocks:
            slot = self._slot_of_block.pop(block, None)
            if slot is not None:
                self._block_of_slot[slot] = None
                self._lengths[slot] = 0

    def slot(self, block: int) -> int:
        """The block's slot. A block without one gets the first free slot."""
        if block not in self._slot_of_block:
            slot = self._block_of_slot.index(None)
            self._block_of_slot[slot] = block
            self._slot_of_block[block] = slot
        return self._slot_of_block[block]

    def set_length(self, block: int, length: int) -> None:
        """Record, after a run, that the block's slot has `length` positions in use."""
        self._lengths[self._slot_of_block[block]] = length

    def compact(self, blocks: Sequence[int]) -> list[int]:
        """Swap slots until `blocks` are in slots 0…len(blocks)-1. Returns the slot of each block, in order."""
        count, wanted = len(blocks), set(blocks)
        outside = [block for block in blocks if self.slot(block) >= count]
        vacant = [slot for slot in range(count) if self._block_of_slot[slot] not in wanted]
        for block, slot in zip(outside, vacant, strict=True):
            self._swap(self._slot_of_block[block], slot)
        return [self._slot_of_block[block] for block in blocks]

    def _swap(self, source: int, target: int) -> None:
        """Swap two slots, copying only the positions in use."""
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
    """Zeros that take memory page by page, as they are written.

    With huge pages, the first position of every head would zero and keep 2 MiB, which costs the first prompt in a slot a
    quarter of a second.
    """
    pages = mmap.mmap(-1, max(1, 4 * math.prod(shape)))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.float32, math.prod(shape)).reshape(shape)
