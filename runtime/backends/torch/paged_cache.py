"""`PagedCache`: the keys and values of every layer in blocks: as many as the configured sequences can fill, or as fit
into memory.

A block of the scheduler is `block_size` positions of all layers of the trunk and of every tail. There is one block that
the scheduler does not know of, the *dummy block*. The rows that pad a captured batch write there, and so do the rows of
a sequence whose block table is out of range.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....kernels.oracle.operands import LayerCache
from ...errors import ConfigError, UnavailableError

DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "float32": torch.float32}
SCALED = (torch.int8, torch.float8_e4m3fn)
FP8_CAPABILITY = 89  # sm_89: below it, no instruction converts to float8_e4m3fn, and Triton does not compile it
SHARE_OF_FREE = 0.9  # of the memory that the weights leave; the rest is for activations and captured graphs


class PagedCache:
    """`trunk[layer]` and `tails[tail][layer]` are `LayerCache`s with `num_blocks` + 1 blocks.

    Keys and values are [num_blocks + 1, kv_heads, block_size, head_size] of `dtype`. An 8-bit cache also has float32
    scales [num_blocks + 1, kv_heads, block_size].
    """

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
    """Bytes of one block. `layers`: layers of the trunk and all tails together."""
    position = head_size * dtype.itemsize + (4 if dtype in SCALED else 0)
    return 2 * layers * kv_heads * block_size * position


def cache_dtype(kv_dtype: str, default: torch.dtype, capability: int | None) -> torch.dtype:
    """What the cache holds. `default`: of the activations, for "auto". `capability`: of the GPU that Triton compiles
    for, such as 90 for sm_90; None: there is none.

    Raises `ConfigError` for fp8 on a GPU that has no instructions for it.
    """
    if kv_dtype == "fp8" and capability is not None and capability < FP8_CAPABILITY:
        raise ConfigError(
            f"kv_dtype is fp8, which needs an NVIDIA GPU of capability {FP8_CAPABILITY / 10} (Ada, Hopper) or newer; "
            f"this one has {capability / 10}: use kv_dtype int8, which takes as many bytes, or bf16"
        )
    return default if kv_dtype == "auto" else DTYPES[kv_dtype]


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, now; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def blocks_that_fit(size: int, wanted: int, free: int | None) -> int:
    """The number of blocks of `size` bytes: `wanted`, or as many as fit into `SHARE_OF_FREE` of the `free` bytes beside
    the dummy block, if these are fewer. `free` None: there is no limit.

    Raises `UnavailableError` if none fits.
    """
    if free is None:
        return wanted
    fit = int(free * SHARE_OF_FREE) // size - 1  # one is the dummy block
    if fit < 1:
        raise UnavailableError(
            f"after the weights {free / 1e9:.2f} GB of GPU memory are free, a block of the KV cache takes {size / 1e6:.1f} MB; "
            "use a smaller bundle, fewer tails or a larger GPU"
        )
    return min(wanted, fit)
