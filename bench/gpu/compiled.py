"""Compile the launches of a piece of code for a GPU that is not there, and keep what the compiler made of each.

The launchers run as they are. Their tensors lie on torch's `meta` device, which has shapes and no memory; only the last
step, the launch itself, stops after the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ...kernels.triton.launch import INTERPRETED
from ...runtime.errors import UnavailableError
from . import problems


class _Driver:
    """What `triton.runtime.driver` asks a driver before a launch."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)  # Triton keeps what it compiled by this number

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that was compiled and not run. `kernel`: file and function, such as `weight_matmul.small`. `arguments`:
    by their names in the kernel, the compile-time ones too."""

    kernel: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    compiled: Any

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return int(self.compiled.metadata.num_warps)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}


@contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """While it is open, launches are compiled for `capability` (90: sm_90), appended to the list, and not run. Operands
    that `problems` makes are on the `meta` device.

    Raises `UnavailableError` if Triton was imported to interpret.
    """
    if INTERPRETED:
        raise UnavailableError("Triton interprets its kernels here; unset TRITON_INTERPRET to compile them")
    found: list[Launch] = []

    def getitem(self: Any, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **options: Any) -> None:
            compiled = self.run(*args, grid=grid, warmup=True, **options)
            if hasattr(compiled, "result"):
                compiled = compiled.result()
            named = dict(zip(self.arg_names, args)) | {k: v for k, v in options.items() if k in self.arg_names}
            name = f"{self.__module__.rsplit('.', 1)[-1]}.{self.__name__.strip('_').removesuffix('_kernel')}"
            found.append(Launch(name, tuple(grid), named, compiled))

        return compile_only

    driver, launch, device = triton.runtime.driver, JITFunction.__getitem__, problems.DEVICE
    active = driver._active
    driver.set_active(_Driver(capability))
    JITFunction.__getitem__ = getitem
    problems.DEVICE = "meta"
    try:
        yield found
    finally:
        JITFunction.__getitem__ = launch
        problems.DEVICE = device
        driver._active = active  # `reset_active` looks for a GPU
