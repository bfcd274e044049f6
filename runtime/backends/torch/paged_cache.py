"""`PagedCache`: keys and values of every layer in blocks, sized from the memory that is free.

A block of the scheduler is `block_size` positions of the trunk's layers once and of each tail's layers once. One block more
than the scheduler knows of is the *dummy block*: rows that only pad a captured batch, and rows of a sequence whose block
table is out of range, write there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....kernels.oracle.operands import LayerCache
from ...errors import UnavailableError

SCALED = (torch.int8, torch.float8_e4m3fn)
SHARE_OF_FREE = 0.9  # of the memory left after the weights; the rest is for activations and captured graphs


class PagedCache:
    """`trunk[layer]` and `tails[tail][layer]` are `LayerCache`s of `num_blocks` + 1 blocks."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        trunk_layers: int,
        tail_layers: Sequence[int],
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dummy_block = num_blocks
        shape = (num_blocks + 1, kv_heads, block_size, head_size)

        def layers(count: int) -> list[LayerCache]:
            return [_layer(shape, dtype, device) for _ in range(count)]

        self.trunk = layers(trunk_layers)
        self.tails = [layers(count) for count in tail_layers]

    @property
    def dummy_slot(self) -> int:
        return self.dummy_block * self.block_size


def _layer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> LayerCache:
    keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype not in SCALED:
        return LayerCache(keys, values)
    scales = [torch.zeros(shape[:3], dtype=torch.float32, device=device) for _ in range(2)]
    return LayerCache(keys, values, *scales)


def block_bytes(layers: int, kv_heads: int, block_size: int, head_size: int, dtype: torch.dtype) -> int:
    """Bytes of a block over `layers` layers (trunk and all tails)."""
    position = head_size * dtype.itemsize + (4 if dtype in SCALED else 0)
    return 2 * layers * kv_heads * block_size * position


def blocks_that_fit(size: int, wanted: int, device: torch.device) -> int:
    """How many blocks of `size` bytes there may be: what is wanted, or on a GPU as many more as the free memory holds.

    Raises `UnavailableError` if not even one fits.
    """
    if device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(device)
    fit = int(free * SHARE_OF_FREE) // size
    if fit < 2:
        raise UnavailableError(
            f"after the weights {free / 1e9:.2f} GB of GPU memory are free, a block of the KV cache takes {size / 1e6:.1f} MB; "
            "use a smaller bundle, fewer tails or a larger GPU"
        )
    return fit - 1  # the dummy block
