"""`EmbeddedSpan`: positions of a prompt whose rows are given as embeddings, and not looked up by token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequestError, shown

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedSpan:
    """`rows` [positions, hidden] stand for the placeholder tokens from position `start` on; they enter the model where the
    embeddings of tokens do, and are not scaled. `digest`: of what they were made from and how; prompts share cached blocks only
    if they have the same. Spans of a prompt are in order and do not overlap.

    Raises `InvalidRequestError` for rows that are not finite float32, or none, and for a digest that is empty."""

    start: int
    rows: F32
    digest: bytes

    def __post_init__(self) -> None:
        rows = self.rows
        if type(self.start) is not int or self.start < 0:
            raise _refusal(f"start must be a position of the prompt, an integer from 0 on, got {shown(self.start)}")
        if not isinstance(rows, np.ndarray) or rows.dtype != np.float32 or rows.ndim != 2 or not rows.size:
            got = f"{rows.dtype} of shape {rows.shape}" if isinstance(rows, np.ndarray) else shown(rows)
            raise _refusal(f"rows must be float32 [positions, hidden], one position at least, got {got}")
        if not np.isfinite(rows).all():
            raise _refusal("rows hold NaN or infinite values; give finite ones")
        if not isinstance(self.digest, bytes) or not self.digest:
            raise _refusal(
                f"digest must be bytes that tell contents apart, got {shown(self.digest)}; give a hash of the content"
            )

    @property
    def end(self) -> int:
        return self.start + len(self.rows)


Spans = tuple[EmbeddedSpan, ...]


def _refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"embedded {reason}", field="embedded")
