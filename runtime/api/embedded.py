"""`EmbeddedSpan`: positions of a prompt whose rows are given as embeddings, and not looked up by token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedSpan:
    """`rows` [positions, hidden] stand for the placeholder tokens from position `start` on; they enter the model where the
    embeddings of tokens do, and are not scaled. `digest`: of what they were made from and how; prompts share cached blocks only
    if they have the same. Spans of a prompt are in order and do not overlap."""

    start: int
    rows: F32
    digest: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.rows)


Spans = tuple[EmbeddedSpan, ...]
