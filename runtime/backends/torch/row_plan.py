"""`RowPlan`: where each row of a batch goes, as flat int32 arrays. It is the host side of a forward pass.

The rows of a sampled sequence attend one by one, drafted rows too. The rows of a prompt attend as a chunk. So the result
for a token depends neither on the batch nor on whether the token was drafted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...schedule.batch import Batch

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The rows of some of a batch's sequences, renumbered 0, 1, … in order."""

    index: I32  # [rows] flat row of the batch
    arrays: dict[str, npt.NDArray[np.int32]]  # what the kernels read; the names are those of `RowInputs`
    max_chunk: int  # rows of the longest chunk; 0 if there are only decode rows

    @property
    def num_rows(self) -> int:
        return len(self.index)


def plan_rows(batch: Batch, seqs: npt.NDArray[np.intp], slots: I32, lengths: I32) -> RowPlan:
    """The plan for the sequences `seqs` (ascending indices).

    slots: [rows of the batch] cache slot of each row. lengths: [num_seqs] context length.
    """
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
    seen = lengths[seqs][seq_of_row] - counts[seq_of_row] + offset + 1  # positions that the row attends to
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
    }
    narrow = {name: np.asarray(array, dtype=np.int32) for name, array in arrays.items()}
    return RowPlan(index, narrow, int(counts[chunk].max(initial=0)))
