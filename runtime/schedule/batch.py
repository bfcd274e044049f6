"""`Batch`: what one step computes, and `StepOutput`: what it yields. Nothing else passes between scheduler and backend.

Both consist of flat arrays. The scheduler fills every field of `Batch`, the backend every field of `StepOutput`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...kernels.oracle.edits import NO_EDITS, Edits
from ..api.request import Space

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ResolvedSampling:
    """How the tokens of a group are drawn, the same for all of its rows (see `resolve.resolve_sampling`)."""

    temperature: float = 1.0  # 0: greedy
    truncation: Mapping[str, float] = field(default_factory=dict)  # rule of `RULES` → value, without rules that are off
    seed: int = 0  # with the position, it determines the counter-based draw
    logprobs: int | None = None  # how many of the most probable tokens to report; None: no log-probabilities
    candidates: tuple[int, ...] = ()  # tokens whose log-probabilities are reported, too; not without `logprobs`
    member_logprobs: bool = False  # report the chosen token's log-probability under each term alone


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to draw: which (row, member) logits are mixed and how, and how to sample from the mix. All terms
    belong to one group. A sequence may have several sampled rows in a step."""

    terms: tuple[tuple[int, int, float], ...]  # (flat row of the batch, member index of the bundle, coefficient)
    space: Space
    sampling: ResolvedSampling
    position: int  # index of the token to draw in its sequence (view 0): prompt length + tokens already drawn
    edits: Edits = NO_EDITS  # of the mixed row
    temperatures: tuple[float, ...] = ()  # [terms] by which the logits of each are divided; empty: all are 1


@dataclass(frozen=True, slots=True)
class EmbeddedRows:
    """Rows of a batch whose embeddings are given: their token ids are placeholders, and are not looked up."""

    rows: I32  # [embedded] rows of the batch, ascending
    values: F32  # [embedded, hidden]


@dataclass(slots=True)
class Batch:
    """The rows of one step. A row is one position of one sequence; sequence s owns rows cu_seqlens_q[s]…[s+1]-1.

    Sampled sequences come first, then prefill chunks. Every row of a sampled sequence is sampled, except prompt rows
    that a backend with `can_sample_prefill` computes in the same step.
    """

    token_ids: I64  # [rows]
    positions: I32  # [rows] position of each row in its sequence
    slot_mapping: I64  # [rows] block_id * block_size + offset: where the row's keys and values are written
    cu_seqlens_q: I32  # [num_seqs + 1]
    context_lens: I32  # [num_seqs] positions in the KV cache after this step
    block_tables: I32  # [num_seqs, max_blocks] block ids, padded with -1
    members: list[tuple[int, ...]]  # [num_seqs] member indices whose tails run over the sequence's rows, ascending
    trunk_cached: Bools  # [num_seqs] the trunk ran over these rows before; only for a backend that keeps its output
    samples: list[SampleRow]  # tokens to draw; prefill chunks have none
    freed_blocks: I32  # blocks whose content died since the previous step
    embedded: EmbeddedRows | None = None  # only for a backend that takes them

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class StepOutput:
    """One entry per sample of the batch, in order. A sample for which no token could be drawn has a message in
    `errors`."""

    token_ids: I64  # [samples]
    logprobs: F64  # [samples] of the token, under the mixed distribution; NaN if sampling.logprobs is None
    top_logprobs: list[list[tuple[int, float]]]  # [samples] the n best (token id, log-probability), best first
    member_logprobs: list[list[float]]  # [samples] of the token, under each term alone; empty if not requested
    candidate_logprobs: list[list[float]]  # [samples] of sampling.candidates, under the mixed distribution
    errors: dict[int, str] = field(default_factory=dict)  # sample index → why it has no token
