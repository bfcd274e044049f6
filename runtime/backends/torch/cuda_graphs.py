"""`DecodeGraphs`: decode steps are captured once per batch size, padded to that size, and replayed.

A decode step of a small model is hundreds of kernel launches of a few microseconds each; replaying a captured graph is one.
The batch sizes form a ladder. A batch is padded to the next rung; its padding rows have length 0 and write to the dummy block.
The kernels are the same as without a graph. There is a rung for each size and set of members (each runs over all rows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .forward import RowInputs
from .packed import Packed

Tensor = torch.Tensor
Run = Callable[[Tensor, RowInputs, tuple[int, ...]], Tensor]  # token_ids, rows, members → hidden [members · rows, H]

MAX_GRAPHS = 64


def ladder(largest: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then steps of 8 up to 64, 16 up to 128, and 32 above. The last rung is at least `largest`."""
    rungs = [1, 2, 4, 8]
    while rungs[-1] < largest:
        rungs.append(rungs[-1] + (8 if rungs[-1] < 64 else 16 if rungs[-1] < 128 else 32))
    return tuple(rung for index, rung in enumerate(rungs) if index == 0 or rungs[index - 1] < largest)


@dataclass(slots=True)
class _Rung:
    """One captured step, with the memory that it reads and writes."""

    inputs: Packed
    rows: RowInputs
    output: Tensor
    graph: Any  # torch.cuda.CUDAGraph; None on a CPU, where the padded step runs without a graph


class DecodeGraphs:
    """Captures, pads and replays decode steps.

    `run`: the function to capture. `largest`: rows of the largest step. `max_blocks`: width of a block table.
    """

    def __init__(
        self, run: Run, *, largest: int, max_blocks: int, block_size: int, dummy_slot: int, device: torch.device
    ) -> None:
        self._run = run
        self._ladder = ladder(largest)
        self._max_blocks = max_blocks
        self._max_length = max_blocks * block_size
        self._dummy_slot = dummy_slot
        self._device = device
        self._rungs: dict[tuple[int, tuple[int, ...]], _Rung] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def rung(self, rows: int) -> int | None:
        """The size that `rows` rows are padded to; None if there are more rows than in the largest rung."""
        return next((size for size in self._ladder if size >= rows), None)

    def warm_up(self, members: tuple[int, ...], rows: int) -> None:
        """Capture the rungs up to `rows` rows for these members. The largest is first, so the others can reuse its memory."""
        for size in reversed(ladder(rows)):
            self._find(size, members)

    def step(self, arrays: Mapping[str, npt.NDArray[np.int32]], members: tuple[int, ...]) -> tuple[Tensor, int] | None:
        """Run one decode step, padded. `arrays`: `RowPlan.arrays`, token_ids [rows], and tables [seqs, width].

        Returns (hidden states [members · rung, H], rung). Row i · rung + r belongs to member i and row r. The states are valid
        until the next step. Returns None if there is no graph: too many rows, or `MAX_GRAPHS` other rungs.
        """
        size = self.rung(len(arrays["token_ids"]))
        if size is None:
            return None
        rung = self._find(size, members, arrays)
        if rung is None:
            return None
        if rung.graph is not None:
            self._fill(rung.inputs, arrays)
            rung.graph.replay()
        return rung.output, size

    # ---- capture -----------------------------------------------------------------------------------------------------

    def _find(
        self,
        size: int,
        members: tuple[int, ...],
        arrays: Mapping[str, npt.NDArray[np.int32]] | None = None,
    ) -> _Rung | None:
        key = (size, members)
        rung = self._rungs.get(key)
        if rung is None:
            if len(self._rungs) >= MAX_GRAPHS:
                return None
            rung = self._new_rung(size)
            self._fill(rung.inputs, arrays or {})
            self._capture(rung, members)
            self._rungs[key] = rung  # after the capture, so that a failed one is tried again
        elif rung.graph is None:  # on a CPU the padded step runs without a graph
            self._fill(rung.inputs, arrays or {})
            rung.output = self._run(rung.inputs.device["token_ids"], rung.rows, members)
        return rung

    def _new_rung(self, size: int) -> _Rung:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("token_ids", "positions", "slots", "rows", "row_seqs", "row_lengths"), (size,)
        )
        shapes |= dict.fromkeys(("chunk_starts", "chunk_sizes", "chunk_lengths", "chunk_seqs"), (0,))
        shapes |= {
            "tables": (size, self._max_blocks),
        }
        inputs = Packed({name: (shape, "int32") for name, shape in shapes.items()}, self._device)
        rows = RowInputs.of(inputs.device, inputs.device["tables"], max_length=self._max_length, max_chunk=0)
        return _Rung(inputs, rows, torch.empty(0), None)

    def _capture(self, rung: _Rung, members: tuple[int, ...]) -> None:
        token_ids = rung.inputs.device["token_ids"]
        if self._pool is None:
            rung.output = self._run(token_ids, rung.rows, members)
            return
        # Run once before the capture, in which kernels must not be compiled and libraries must not start. It writes to the
        # cache what the step will write again.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._run(token_ids, rung.rows, members)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            rung.output = self._run(token_ids, rung.rows, members)
        rung.graph = graph

    def _fill(self, inputs: Packed, arrays: Mapping[str, npt.NDArray[np.int32]]) -> None:
        host = inputs.host
        for name in ("token_ids", "positions", "row_seqs", "row_lengths"):
            host[name].fill(0)
        host["slots"].fill(self._dummy_slot)
        host["rows"][:] = np.arange(len(host["rows"]))
        inputs.fill(arrays)
        inputs.upload()
