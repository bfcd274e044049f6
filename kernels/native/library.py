"""The shared library of the native CPU kernels, loaded through ctypes, and what it says of this machine.

It is an optional extension: where no compiler was at hand at installation there is none, and `load()` raises
`UnavailableError`. Calls release the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ...runtime.errors import UnavailableError
from .structs import ModelConfig, Tensor

EMULATED = "amx-emulated"  # the path whose matrix tiles are plain C++: for tests, never chosen by itself
LIBRARY_VARIABLE = "MOTET_CPU_LIBRARY"  # overrides which shared library is loaded


@functools.cache
def load() -> ctypes.CDLL:
    """The shared library. Raises `UnavailableError` where it was not built."""
    override = os.environ.get(LIBRARY_VARIABLE)
    found = [Path(override)] if override else sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not found:
        raise UnavailableError(
            "the native CPU kernels were not built; install Motet where a C++17 compiler is, or use backend 'onnx'"
        )
    lib = ctypes.CDLL(str(found[0]))
    try:
        _declare(lib)
    except AttributeError as error:
        raise UnavailableError(
            f"'{found[0]}' is of another version of Motet ({error}); install it again, or use backend 'onnx'"
        ) from error
    return lib


def _declare(lib: ctypes.CDLL) -> None:
    """The C interface of `motet.h`. Raises `AttributeError` if the library lacks a function."""
    lib.motet_error.restype = ctypes.c_char_p
    lib.motet_isa_name.restype = ctypes.c_char_p
    lib.motet_isa_name.argtypes = [ctypes.c_int]
    lib.motet_create.argtypes = [ctypes.POINTER(ModelConfig), ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
    lib.motet_destroy.argtypes = [ctypes.c_void_p]
    lib.motet_set_linear.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.POINTER(Tensor)]
    lib.motet_share_linear.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    lib.motet_set_adapter.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
    ]
    lib.motet_set_vector.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_void_p, ctypes.c_int64),
    ]
    lib.motet_set_window.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    lib.motet_set_rotary.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    lib.motet_ready.argtypes = [ctypes.c_void_p]
    lib.motet_step.argtypes = [ctypes.c_void_p] * 3
    lib.motet_head.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    lib.motet_generate.argtypes = [ctypes.c_void_p] * 4
    lib.motet_sample.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    lib.motet_logits_stride.argtypes = [ctypes.c_void_p]
    lib.motet_logits_stride.restype = ctypes.c_int64
    lib.motet_seconds.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    for probe in (lib.motet_probe_dot, lib.motet_probe_read):
        probe.argtypes = [ctypes.c_char_p, ctypes.c_int]
        probe.restype = ctypes.c_double


def is_available() -> bool:
    """Whether the kernels were built and load."""
    try:
        load()
    except (UnavailableError, OSError):
        return False
    return True


def isa_names() -> tuple[str, ...]:
    """The instruction sets that this CPU runs, best first, and `EMULATED` at the end."""
    lib = load()
    return tuple(lib.motet_isa_name(index).decode() for index in range(lib.motet_isa_count()))


def probe_read(threads: int) -> float:
    """GB/s that `threads` threads read from memory."""
    return float(load().motet_probe_read(b"", threads))


def probe_dot(threads: int, isa: str = "") -> float:
    """8-bit multiply-accumulates of `threads` threads, GMAC/s: the peak of an instruction set's dot products (default: the
    best's). 0 if this CPU does not run it."""
    return float(load().motet_probe_dot(isa.encode(), threads))


def address(array: npt.NDArray[Any]) -> int:
    """Of a contiguous array's first element. `array.ctypes.data` takes four times as long, which a step feels."""
    if array.size and array.flags.writeable:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    return array.ctypes.data


def addresses(*arrays: npt.NDArray[Any]) -> list[int]:
    return [address(array) for array in arrays]
