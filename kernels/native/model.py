"""A decoder in native memory: packed weights, a paged KV cache and low-rank adapters.

Sizes and layouts: `kernels/native/cpp/motet.h`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.errors import BundleError, MotetError, UnavailableError
from .library import address, addresses, load
from .structs import BatchArrays, LinearKind, Mixes, ModelConfig, Rotary, Tensor, Vector

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

BLOCK_SIZE = 32  # positions of a block of the KV cache
PARTS = ("linears", "attention", "head", "other")
ISA_VARIABLE = "MOTET_CPU_ISA"  # overrides which instruction set is used


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight [rows, columns] as a bundle stores it: `values` (quantised) or `dense`; see docs/bundle.md."""

    rows: int
    columns: int
    bits: int = 32
    group_size: int = 0
    values: U8 | None = None
    scales: npt.NDArray[np.floating[Any]] | None = None
    minima: npt.NDArray[np.floating[Any]] | None = None
    dense: F32 | None = None
    bias: F32 | None = None


class PackedBatch:
    """A packed batch as the library reads it (fields as in `runtime.schedule.batch.Batch`).

    `members[m]` are the sequences that member m's tail sees, None without tails; `outputs` are (member, row), ascending.
    `embedded`: rows [E], ascending, and their embeddings [E, hidden].
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
        trunk_cached: npt.NDArray[np.bool_],
        members: Sequence[Sequence[int]] | None,
        outputs: Sequence[tuple[int, int]],
        freed_blocks: I32,
        embedded: tuple[I32, F32] | None = None,
    ) -> None:
        rows, seqs = len(token_ids), len(context_lens)
        lengths = (len(positions), len(slot_mapping), len(cu_seqlens), len(trunk_cached), len(block_tables))
        if lengths != (rows, rows, seqs + 1, seqs, seqs):
            raise MotetError("the batch's arrays have inconsistent lengths")
        arrays: list[npt.NDArray[Any]] = [
            np.ascontiguousarray(token_ids, np.int64),
            np.ascontiguousarray(positions, np.int32),
            np.ascontiguousarray(slot_mapping, np.int64),
            np.ascontiguousarray(cu_seqlens, np.int32),
            np.ascontiguousarray(context_lens, np.int32),
            np.ascontiguousarray(block_tables, np.int32),
            np.ascontiguousarray(trunk_cached, np.uint8),
        ]
        if members is not None:
            arrays.append(np.array([0, *accumulate(map(len, members))], np.int64))
            arrays.append(np.array([s for sequences in members for s in sequences], np.int32))
        tails = (None, None) if members is None else ()
        asked = [np.array([member for member, _ in outputs], np.int32), np.array([row for _, row in outputs], np.int32)]
        freed = np.ascontiguousarray(freed_blocks, np.int32)
        given: tuple[npt.NDArray[Any], ...] = ()
        if embedded is not None:
            given = np.ascontiguousarray(embedded[0], np.int32), np.ascontiguousarray(embedded[1], np.float32)
            if given[1].ndim != 2 or len(given[0]) != len(given[1]):
                raise MotetError("the embedded rows and their values have inconsistent lengths")
        self.embedded_size = None if embedded is None else int(given[1].shape[1])
        self._keep = (*arrays, *asked, freed, *given)
        self.struct = BatchArrays(
            *(rows, seqs, block_tables.shape[1]),
            *(*addresses(*arrays), *tails),
            *(len(freed), *addresses(freed)),
            *(len(outputs), *addresses(*asked)),
            *((len(given[0]), *addresses(*given)) if given else (0, None, None)),
        )


class NativeModel:
    """A decoder in native memory. Not thread-safe. Errors of the library become `MotetError`s.

    `tail_of`: each member's tail; empty if there are no tails.
    """

    def __init__(self, config: ModelConfig, tail_of: Sequence[int] = (), isa: str | None = None) -> None:
        self._library = load()
        tails = np.array(tail_of, np.int32)
        config.num_tails = len(set(tail_of))
        config.tail_of = address(tails) if len(tails) else None
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

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "_handle") and not is_ending():  # at the end of the process the modules are gone
            self.close()

    def set_linear(self, which: LinearKind, layer: int, weight: Weight, name: str, expert: int = -1) -> None:
        """Pack a weight; the arrays are not kept. `name` is for the error message. `expert`: its number, of UP and DOWN of a
        layer with experts."""
        arrays = {
            field: _contiguous(getattr(weight, field), np.uint8 if field == "values" else np.float32)
            for field in ("values", "scales", "minima", "dense", "bias")
        }
        values = arrays["values"]
        groups = 0 if values is None else weight.columns // max(weight.group_size, 1)
        shapes = {
            "values": (weight.rows, groups, weight.group_size * weight.bits // 8),
            "scales": (weight.rows, groups),
            "minima": (weight.rows, groups),
            "dense": (weight.rows, weight.columns),
            "bias": (weight.rows,),
        }
        for field, array in arrays.items():
            if array is not None and array.shape != shapes[field]:
                raise BundleError(f"{name}: its {field} are {list(array.shape)}, they must be {list(shapes[field])}")
        tensor = Tensor(weight.rows, weight.columns, weight.bits, weight.group_size)
        for field, array in arrays.items():
            setattr(tensor, field, None if array is None else address(array))
        self._check(self._library.motet_set_linear(self._handle, which, layer, expert, ctypes.byref(tensor)), name)

    def share_linear(self, which: LinearKind, layer: int, source: int, expert: int = -1) -> None:
        """Layer `layer` uses the weight of layer `source`."""
        self._check(self._library.motet_share_linear(self._handle, which, layer, expert, source), f"layer {layer}")

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

    def set_rotary(self, layer: int, tables: Rotary) -> None:
        """The tables by which queries and keys are rotated in this layer; unless set, `Rotary.ALL`."""
        self._check(self._library.motet_set_rotary(self._handle, layer, tables), f"layer {layer}")

    def set_window(self, layer: int, window: int) -> None:
        """Rows attend to the last `window` positions in this layer, their own included; unless set, to all."""
        self._check(self._library.motet_set_window(self._handle, layer, window), f"layer {layer}")

    def ready(self) -> None:
        """Raises `BundleError` when a weight is missing."""
        self._check(self._library.motet_ready(self._handle), "the model")

    def step(self, batch: PackedBatch) -> F32:
        """Final hidden states [outputs, hidden]."""
        self._check_embedded(batch)
        hidden = np.empty((batch.struct.num_outputs, self.hidden_size), np.float32)
        code = self._library.motet_step(self._handle, ctypes.byref(batch.struct), hidden.ctypes.data)
        self._check(code, "the batch", MotetError)
        return hidden

    def generate(
        self,
        batch: PackedBatch,
        terms: Sequence[Sequence[tuple[int, float]]],
        temperatures: Sequence[float],
        greedy: Sequence[bool],
        sampling: ctypes.Structure,
        written: Sequence[int] = (),
    ) -> F32:
        """Run a batch and fill in `sampling` (a `MotetSampling`), whose rows of logits are mixes of the batch's outputs:
        row r is Σ coefficient · output[index] over terms[r], through the head, divided by temperatures[r]. Where `greedy[r]`,
        only the largest logit is meant to be used: what cannot become it may be off by the head's rounding. Returns the logits of
        the rows `written`, [written, vocab]."""
        self._check_embedded(batch)
        offsets = np.array([0, *accumulate(map(len, terms))], np.int64)
        sources = np.array([index for row in terms for index, _ in row], np.int32)
        coefficients = np.array([c for row in terms for _, c in row], np.float32)
        divisors, flags = np.array(temperatures, np.float32), np.array(greedy, np.uint8)
        written_rows = np.array(written, np.int64)
        logits = np.empty((len(written), self.vocab_size), np.float32)
        mixes = Mixes(
            *(len(terms), *addresses(offsets, sources, coefficients, divisors, flags)),
            *(len(written), *addresses(written_rows, logits)),
        )
        code = self._library.motet_generate(
            self._handle, ctypes.byref(batch.struct), ctypes.byref(mixes), ctypes.byref(sampling)
        )
        self._check(code, "the step", MotetError)
        return logits

    def head(self, hidden: F32) -> F32:
        """Logits [rows, vocab] (a view of padded rows) of hidden states [rows, hidden]."""
        hidden = np.ascontiguousarray(hidden, np.float32)
        logits = np.empty((len(hidden), self._stride), np.float32)
        code = self._library.motet_head(self._handle, hidden.ctypes.data, len(hidden), logits.ctypes.data)
        self._check(code, "the head", MotetError)
        return logits[:, : self.vocab_size]

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each of `PARTS` since the last call."""
        values = np.zeros(len(PARTS), np.float64)
        self._library.motet_seconds(self._handle, values.ctypes.data)
        return dict(zip(PARTS, values.tolist(), strict=True))

    def _check_embedded(self, batch: PackedBatch) -> None:
        if batch.embedded_size not in (None, self.hidden_size):
            raise MotetError(f"embedded rows have {batch.embedded_size} elements, the model's {self.hidden_size}")

    def _check(self, code: int, name: str, invalid: type[MotetError] = BundleError) -> None:
        """Raises `invalid` for arguments that do not fit: while loading they are the bundle's, in a step the caller's."""
        if code == 0:
            return
        message = f"{name}: {self._library.motet_error().decode()}"
        raise {1: invalid, 2: UnavailableError}.get(code, MotetError)(message)


def _contiguous(array: npt.NDArray[Any] | None, dtype: type) -> npt.NDArray[Any] | None:
    return None if array is None else np.ascontiguousarray(array, dtype)
