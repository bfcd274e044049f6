"""`Packed`: many small host arrays that go to the device in one copy.

A step has a dozen small inputs. One copy per input would cost more than the kernels that read them. So all are in one buffer,
each at a multiple of 16 bytes; the buffer is pinned if the device is a GPU, and each device array is a view of its copy. On a
CPU, host and device arrays share memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


class Packed:
    """Arrays with fixed names, shapes and dtypes. Fill `host[name]`, call `upload()`, read `device[name]`.

    `specs`: name → (shape, dtype), where the dtype is int32, int64 or float32.
    """

    def __init__(self, specs: Mapping[str, tuple[tuple[int, ...], str]], device: torch.device) -> None:
        sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in specs.items()}
        total = sum(-(-size // 16) * 16 for size in sizes.values())
        cuda = device.type == "cuda"
        self._staging = torch.empty(max(total, 16), dtype=torch.uint8, pin_memory=cuda)
        self._buffer = torch.empty_like(self._staging, device=device) if cuda else self._staging
        self.host: dict[str, Array] = {}
        self.device: dict[str, torch.Tensor] = {}
        at = 0
        flat = self._staging.numpy()
        for name, (shape, dtype) in specs.items():
            end = at + sizes[name]
            self.host[name] = flat[at:end].view(dtype).reshape(shape)
            self.device[name] = self._buffer[at:end].view(_DTYPES[dtype]).view(shape)
            at += -(-sizes[name] // 16) * 16

    @classmethod
    def of(cls, arrays: Mapping[str, Array], device: torch.device) -> Packed:
        """A `Packed` with the shapes of `arrays`, filled and uploaded."""
        packed = cls({name: (array.shape, array.dtype.name) for name, array in arrays.items()}, device)
        packed.fill(arrays)
        packed.upload()
        return packed

    def fill(self, arrays: Mapping[str, Array]) -> None:
        """Copy arrays to the host side. An array that is smaller than its place fills the beginning of it."""
        for name, array in arrays.items():
            self.host[name][tuple(slice(size) for size in array.shape)] = array

    def upload(self) -> None:
        """Start one asynchronous copy. Do not fill the host side again before the step that reads it has ended."""
        if self._buffer is not self._staging:
            self._buffer.copy_(self._staging, non_blocking=True)
