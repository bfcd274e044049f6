"""`RowPlan`: which rows of a batch go where, as flat int32 arrays: the host side of a forward pass.

A sequence whose rows are sampled attends row by row, one row or several drafted ones; a prompt's rows attend as a chunk. So
a token's result depends neither on the batch nor on whether it was drafted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....kernels.oracle.operands import ADAPTER_TILE
from ...schedule.batch import Batch

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """A subset of a batch's sequences and their rows, renumbered 0, 1, … in order; `index` are the flat rows."""

    index: I32  # [rows]
    arrays: dict[str, npt.NDArray[np.int32]]  # what the kernels read, by the names of `StepInputs`
    max_chunk: int  # rows of the longest chunk; 0: decode rows only

    @property
    def num_rows(self) -> int:
        return len(self.index)


def plan_rows(batch: Batch, seqs: npt.NDArray[np.intp], slots: I32, lengths: I32, adapters: I32) -> RowPlan:
    """Rows of the sequences `seqs` (ascending). slots [rows of the batch]; lengths and adapters [num_seqs]."""
    starts = batch.cu_seqlens_q[seqs].astype(np.int64)
    counts = np.diff(batch.cu_seqlens_q)[seqs].astype(np.int64)
    firsts = np.cumsum(counts) - counts  # renumbered first row of each sequence
    seq_of_row = np.repeat(np.arange(len(seqs)), counts)
    offset = np.arange(len(seq_of_row)) - firsts[seq_of_row]
    index = (starts[seq_of_row] + offset).astype(np.int32)
    sampled = np.zeros(batch.num_seqs, bool)
    flat = [row for sample in batch.samples for row, _, _ in sample.terms]
    sampled[np.searchsorted(batch.cu_seqlens_q, flat, side="right") - 1] = True
    rows = np.flatnonzero(sampled[seqs][seq_of_row])
    seen = lengths[seqs][seq_of_row] - counts[seq_of_row] + offset + 1  # positions that a row sees
    chunk = np.flatnonzero(~sampled[seqs])
    arrays = {
        "positions": batch.positions[index],
        "slots": slots[index],
        "rows": rows,
        "row_seqs": seqs[seq_of_row[rows]],
        "row_lengths": seen[rows],
        "chunk_starts": firsts[chunk],
        "chunk_sizes": counts[chunk],
        "chunk_lengths": lengths[seqs[chunk]],
        "chunk_seqs": seqs[chunk],
        **_adapter_tiles(adapters[seqs][seq_of_row]),
    }
    narrow = {name: np.asarray(array, dtype=np.int32) for name, array in arrays.items()}
    return RowPlan(index, narrow, int(counts[chunk].max(initial=0)))


def _adapter_tiles(adapters: npt.NDArray[np.int32]) -> dict[str, I32]:
    """Rows grouped by adapter in tiles of `ADAPTER_TILE`; see `operands.AdapterTiles`."""
    order: list[I32] = []
    tiles: list[int] = []
    for adapter in np.unique(adapters[adapters >= 0]).tolist():
        rows = np.flatnonzero(adapters == adapter).astype(np.int32)
        for start in range(0, len(rows), ADAPTER_TILE):
            tile = np.full(ADAPTER_TILE, -1, np.int32)
            part = rows[start : start + ADAPTER_TILE]
            tile[: len(part)] = part
            order.append(tile)
            tiles.append(adapter)
    flat = np.concatenate(order) if order else np.empty(0, np.int32)
    return {"adapter_order": flat, "adapter_tiles": np.array(tiles, np.int32)}
