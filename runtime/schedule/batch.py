"""`Batch`: what one step computes, and `StepOutput`: what it yields. The only things that cross to a backend.

Both are flat arrays; the scheduler fills every field of `Batch` and the backend every field of `StepOutput`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..api.request import Space
from ..api.sampling import SamplingParams

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


@dataclass(slots=True)
class SampleRow:
    """One token to be drawn: which (row, member) logits are mixed, how, and how to sample from the mix. All terms are rows of
    one group; a sequence may have several sampled rows in one step."""

    terms: tuple[tuple[int, int, float], ...]  # (flat row of the batch, member index of the bundle, coefficient)
    space: Space
    params: SamplingParams
    seed: int  # with position, the key of the counter-based draw
    position: int  # index of the token to draw in its sequence (view 0): prompt length + tokens already drawn
    text: I64  # view 0 as far as it goes, prompt and drawn tokens; for the penalties
    num_prompt: int  # of them, the prompt's
    forbidden_ids: tuple[int, ...] = ()  # end-of-sequence and stop ids while min_tokens is not reached
    return_member_logprobs: bool = False

    @property
    def prompt_ids(self) -> I64:
        return self.text[: self.num_prompt]

    @property
    def output_ids(self) -> I64:
        return self.text[self.num_prompt :]


@dataclass(slots=True)
class Batch:
    """The rows of one step. A row is one position of one sequence; sequence s owns rows cu_seqlens_q[s]…[s+1]-1.

    Sequences that are sampled come first, then prefill chunks. Of a sequence that is sampled all rows are; where the backend
    can sample prefill, they may follow rows of its prompt.
    """

    token_ids: I64  # [rows]
    positions: I32  # [rows] position of each row in its sequence
    slot_mapping: I64  # [rows] block_id * block_size + offset where the row's K and V are written
    cu_seqlens_q: I32  # [num_seqs + 1]
    context_lens: I32  # [num_seqs] positions in the KV cache after this step
    block_tables: I32  # [num_seqs, max_blocks] block ids, -1 padded
    members: list[tuple[int, ...]]  # [num_seqs] member indices whose tails run over the sequence's rows, ascending
    adapters: I32  # [num_seqs] member whose low-rank update applies to all rows of the sequence, -1 for none
    samples: list[SampleRow]  # tokens to draw; prefill chunks have none
    freed_blocks: I32  # blocks freed since the previous step: their content is dead

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class StepOutput:
    """One entry per `Batch.samples`, in order. A row whose logits hold NaN has its message in `errors`."""

    token_ids: I64  # [samples]
    logprobs: F64  # [samples] log-probability under the mixed distribution; NaN where params.logprobs is None
    top_logprobs: list[list[tuple[int, float]]]  # [samples] the n best (token id, log-probability), best first
    member_logprobs: list[list[float]]  # [samples] the chosen token under each term alone; empty where not asked
    errors: dict[int, str] = field(default_factory=dict)  # sample index → why it has no token
