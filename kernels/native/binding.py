"""The native CPU kernels of `kernels/cpu` through ctypes: a decoder with packed weights and a paged KV cache.

The shared library is an optional extension: where no compiler was at hand at installation there is none, and `library()`
raises `UnavailableError`. Calls release the GIL. Sizes and layouts: `kernels/native/cpp/motet.h`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.errors import BundleError, MotetError, UnavailableError

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

BLOCK_SIZE = 32  # positions of a block of the KV cache
PARTS = ("linears", "attention", "head", "other")
ISA_VARIABLE = "MOTET_CPU_ISA"  # overrides which instruction set is used
LIBRARY_VARIABLE = "MOTET_CPU_LIBRARY"  # overrides which shared library is loaded


class LinearKind(IntEnum):
    """Linear layers, as `motet.h` numbers them. `UP` is gate and up stacked where the activation is SwiGLU."""

    QKV = 0
    OUT = 1
    UP = 2
    DOWN = 3
    HEAD = 4
    EMBEDDING = 5


class Vector(IntEnum):
    """Vectors, as `motet.h` numbers them; indexed by layer, the final norms by member, the tables not at all."""

    ATTENTION_NORM = 0
    ATTENTION_NORM_BIAS = 1
    MLP_NORM = 2
    MLP_NORM_BIAS = 3
    Q_NORM = 4
    K_NORM = 5
    FINAL_NORM = 6
    FINAL_NORM_BIAS = 7
    POSITIONS = 8
    COS = 9
    SIN = 10


class ModelConfig(ctypes.Structure):
    """`MotetConfig`."""

    _fields_ = [
        *[
            (name, ctypes.c_int32)
            for name in (
                *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
                *("head_size", "max_positions", "layer_norm", "gelu", "learned", "qk_norm", "tied_head", "split_layer"),
                *("num_members", "kv_int8", "num_blocks", "threads"),
            )
        ],
        ("norm_eps", ctypes.c_float),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("stored_groups", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zero_points", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("num_rows", "num_seqs", "max_blocks")],
        *[
            (name, ctypes.c_void_p)
            for name in (
                *("token_ids", "positions", "slot_mapping", "cu_seqlens", "context_lens", "block_tables", "adapters"),
                *("member_offsets", "member_seqs"),
            )
        ],
        ("num_outputs", ctypes.c_int64),
        ("output_members", ctypes.c_void_p),
        ("output_rows", ctypes.c_void_p),
    ]


class _Mixes(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("offsets", "sources", "coefficients", "greedy")),
        ("num_written", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("written_rows", "written")),
    ]


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight [rows, columns] as a bundle stores it: `values` (quantised) or `dense`; see docs/bundle.md."""

    rows: int
    columns: int
    bits: int = 32
    group_size: int = 0
    values: U8 | None = None
    scales: F32 | None = None
    zero_points: U8 | None = None
    dense: F32 | None = None
    bias: F32 | None = None


@functools.cache
def library() -> ctypes.CDLL:
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
    lib.motet_set_linear.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Tensor)]
    lib.motet_share_linear.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    lib.motet_set_adapter.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
    ]
    lib.motet_set_vector.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_void_p, ctypes.c_int64),
    ]
    lib.motet_set_window.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
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
        library()
    except (UnavailableError, OSError):
        return False
    return True


def isa_names() -> tuple[str, ...]:
    """The instruction sets that this CPU runs, best first."""
    lib = library()
    return tuple(lib.motet_isa_name(index).decode() for index in range(lib.motet_isa_count()))


def probe_read(threads: int) -> float:
    """GB/s that `threads` threads read from memory."""
    return float(library().motet_probe_read(b"", threads))


def probe_dot(threads: int) -> float:
    """8-bit multiply-accumulates of `threads` threads, GMAC/s: the peak of the dot product instruction in use."""
    return float(library().motet_probe_dot(b"", threads))


class PackedBatch:
    """A packed batch as the library reads it (fields as in `runtime.batch.Batch`).

    `members[m]` are the sequences that member m's tail sees, None without tails; `outputs` are (member, row), ascending.
    """

    def __init__(
        self,
        *,
        token_ids: I64,
        positions: I32,
        slot_mapping: I64,
        cu_seqlens: I32,
        context_lens: I32,
        block_tables: I32,
        adapters: I32,
        members: Sequence[Sequence[int]] | None,
        outputs: Sequence[tuple[int, int]],
    ) -> None:
        rows, seqs = len(token_ids), len(context_lens)
        lengths = (len(positions), len(slot_mapping), len(cu_seqlens), len(adapters), len(block_tables))
        if lengths != (rows, rows, seqs + 1, seqs, seqs):
            raise MotetError("the batch's arrays have inconsistent lengths")
        arrays: list[npt.NDArray[Any]] = [
            np.ascontiguousarray(token_ids, np.int64),
            np.ascontiguousarray(positions, np.int32),
            np.ascontiguousarray(slot_mapping, np.int64),
            np.ascontiguousarray(cu_seqlens, np.int32),
            np.ascontiguousarray(context_lens, np.int32),
            np.ascontiguousarray(block_tables, np.int32),
            np.ascontiguousarray(adapters, np.int32),
        ]
        if members is not None:
            arrays.append(np.array([0, *accumulate(map(len, members))], np.int64))
            arrays.append(np.array([s for sequences in members for s in sequences], np.int32))
        tails = (None, None) if members is None else ()
        asked = [np.array([member for member, _ in outputs], np.int32), np.array([row for _, row in outputs], np.int32)]
        self._keep = (*arrays, *asked)
        self.struct = _Batch(
            *(rows, seqs, block_tables.shape[1]),
            *(*addresses(*arrays), *tails),
            *(len(outputs), *addresses(*asked)),
        )


class NativeModel:
    """A decoder in native memory. Not thread-safe. Errors of the library become `MotetError`s."""

    def __init__(self, config: ModelConfig, isa: str | None = None) -> None:
        self._library = library()
        self._handle = ctypes.c_void_p()
        name = isa if isa is not None else os.environ.get(ISA_VARIABLE, "")
        self._check(self._library.motet_create(ctypes.byref(config), name.encode(), ctypes.byref(self._handle)), name)
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self._stride = int(self._library.motet_logits_stride(self._handle))

    @property
    def handle(self) -> ctypes.c_void_p:
        """What the library's functions take; null once closed."""
        return self._handle

    def close(self) -> None:
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            self._library.motet_destroy(handle)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()

    def set_linear(self, which: LinearKind, layer: int, weight: Weight, name: str) -> None:
        """Pack a weight; the arrays are not kept. `name` is for the error message."""
        arrays = {
            field: _contiguous(getattr(weight, field), np.uint8 if field in ("values", "zero_points") else np.float32)
            for field in ("values", "scales", "zero_points", "dense", "bias")
        }
        values = arrays["values"]
        groups = int(values.shape[1]) if values is not None else 0
        shapes = {
            "values": (weight.rows, groups, weight.group_size * weight.bits // 8),
            "scales": (weight.rows, groups),
            "zero_points": (weight.rows, -(-groups // 2)),
            "dense": (weight.rows, weight.columns),
            "bias": (weight.rows,),
        }
        for field, array in arrays.items():
            if array is not None and array.shape != shapes[field]:
                raise BundleError(f"{name}: its {field} are {list(array.shape)}, they must be {list(shapes[field])}")
        tensor = _Tensor(weight.rows, weight.columns, weight.bits, weight.group_size, groups)
        for field, array in arrays.items():
            setattr(tensor, field, None if array is None else address(array))
        self._check(self._library.motet_set_linear(self._handle, which, layer, ctypes.byref(tensor)), name)

    def share_linear(self, which: LinearKind, layer: int, source: int) -> None:
        """Layer `layer` uses the weight of layer `source`."""
        self._check(self._library.motet_share_linear(self._handle, which, layer, source), f"layer {layer}")

    def set_adapter(self, which: LinearKind, layer: int, member: int, a: F32, b: F32, name: str) -> None:
        """y += b (a x) for the rows of `member`; a [rank, columns], b [rows, rank]."""
        a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise BundleError(f"{name}: the shapes {a.shape} and {b.shape} of a low-rank adapter do not fit together")
        code = self._library.motet_set_adapter(
            self._handle, which, layer, member, len(a), a.ctypes.data, a.shape[1], b.ctypes.data, b.shape[0]
        )
        self._check(code, name)

    def set_vector(self, which: Vector, index: int, values: F32, name: str) -> None:
        """Copy a norm, a bias or a table."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        self._check(self._library.motet_set_vector(self._handle, which, index, flat.ctypes.data, flat.size), name)

    def set_window(self, layer: int, window: int) -> None:
        """Rows attend to the last `window` positions in this layer, their own included; unless set, to all."""
        self._check(self._library.motet_set_window(self._handle, layer, window), f"layer {layer}")

    def ready(self) -> None:
        """Raises `BundleError` when a weight is missing."""
        self._check(self._library.motet_ready(self._handle), "the model")

    def step(self, batch: PackedBatch) -> F32:
        """Final hidden states [outputs, hidden]."""
        hidden = np.empty((batch.struct.num_outputs, self.hidden_size), np.float32)
        code = self._library.motet_step(self._handle, ctypes.byref(batch.struct), hidden.ctypes.data)
        self._check(code, "the batch")
        return hidden

    def generate(
        self,
        batch: PackedBatch,
        terms: Sequence[Sequence[tuple[int, float]]],
        greedy: Sequence[bool],
        sampling: ctypes.Structure,
        written: Sequence[int] = (),
    ) -> F32:
        """Run a batch and fill in `sampling` (a `MotetSampling`), whose rows of logits are mixes of the batch's outputs:
        row r is Σ coefficient · output[index] over terms[r], through the head. Where `greedy[r]`, only the largest logit is
        meant to be used: what cannot become it may be off by the head's rounding. Returns the logits of the rows
        `written`, [written, vocab]."""
        offsets = np.array([0, *accumulate(map(len, terms))], np.int64)
        sources = np.array([index for row in terms for index, _ in row], np.int32)
        coefficients = np.array([c for row in terms for _, c in row], np.float32)
        flags = np.array(greedy, np.uint8)
        written_rows = np.array(written, np.int64)
        logits = np.empty((len(written), self.vocab_size), np.float32)
        mixes = _Mixes(
            *(len(terms), *addresses(offsets, sources, coefficients, flags)),
            *(len(written), *addresses(written_rows, logits)),
        )
        code = self._library.motet_generate(
            self._handle, ctypes.byref(batch.struct), ctypes.byref(mixes), ctypes.byref(sampling)
        )
        self._check(code, "the step")
        return logits

    def head(self, hidden: F32) -> F32:
        """Logits [rows, vocab] (a view of padded rows) of hidden states [rows, hidden]."""
        hidden = np.ascontiguousarray(hidden, np.float32)
        logits = np.empty((len(hidden), self._stride), np.float32)
        code = self._library.motet_head(self._handle, hidden.ctypes.data, len(hidden), logits.ctypes.data)
        self._check(code, "the head")
        return logits[:, : self.vocab_size]

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each of `PARTS` since the last call."""
        values = np.zeros(len(PARTS), np.float64)
        self._library.motet_seconds(self._handle, values.ctypes.data)
        return dict(zip(PARTS, values.tolist(), strict=True))

    def _check(self, code: int, name: str) -> None:
        if code == 0:
            return
        message = f"{name}: {self._library.motet_error().decode()}"
        raise {1: BundleError, 2: UnavailableError}.get(code, MotetError)(message)


def _contiguous(array: npt.NDArray[Any] | None, dtype: type) -> npt.NDArray[Any] | None:
    return None if array is None else np.ascontiguousarray(array, dtype)


def address(array: npt.NDArray[Any]) -> int:
    """Of a contiguous array's first element. `array.ctypes.data` takes four times as long, which a step feels."""
    if array.size and array.flags.writeable:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    return array.ctypes.data


def addresses(*arrays: npt.NDArray[Any]) -> list[int]:
    return [address(array) for array in arrays]
