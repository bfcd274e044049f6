"""`Edits`: how a row of mixed logits is changed before the draw, and the oracle that applies them.

Edits are computed once, on the host, from the text so far; every executor only applies them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """A token's logit x becomes (x > 0: x / divisor, else x · divisor) − penalty + bias; other logits are
    unchanged. Then, if there is a mask, tokens whose bit is 0 become -inf.

    The order of the operations is part of the definition: results are compared bit for bit.
    """

    ids: I64  # [n] no token twice
    divisors: F64  # [n] above 0; 1: no effect
    penalties: F64  # [n] subtracted
    biases: F64  # [n] added; -inf forbids the token
    mask: U32 | None = None  # [ceil(vocab / 32)] bit id % 32 of word id // 32 is 1 if the token is allowed

    @property
    def is_empty(self) -> bool:
        return not len(self.ids) and self.mask is None


_NONE = np.empty(0, np.float64)
NO_EDITS = Edits(np.empty(0, np.int64), _NONE, _NONE, _NONE)


def apply_edits(mixed: F64, edits: Edits) -> F64:
    """Edited mixed logits [vocab]; `mixed` itself if there is nothing to edit."""
    if edits.is_empty:
        return mixed
    edited = mixed.copy()
    old = edited[edits.ids]
    scaled = np.where(old > 0, old / edits.divisors, old * edits.divisors)
    edited[edits.ids] = scaled - edits.penalties + edits.biases
    if edits.mask is not None:
        bits = np.unpackbits(edits.mask.astype("<u4").view(np.uint8), count=len(edited), bitorder="little")
        edited[bits == 0] = -np.inf
    return edited
