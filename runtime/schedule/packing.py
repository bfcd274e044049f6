"""`ScheduledBatch`: the rows that the scheduler chose for a step, and `pack`, which lays them out as a `Batch`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..api.request import FinishReason
from .batch import Batch, EmbeddedRows, SampleRow
from .resolve import force
from .sequence import Group, Sequence

I64 = npt.NDArray[np.int64]


def _no_draft() -> I64:
    return np.empty(0, np.int64)


@dataclass(slots=True, eq=False)
class GroupRows:
    """Rows of a group that draws in this step. Each sequence has its remaining prompt rows, one row for its last token and
    one per draft token; a token is drawn at every row but the prompt's."""

    group: Group
    prompt_rows: list[int]  # of each sequence
    draft: I64 = field(default_factory=_no_draft)  # [drafted], the same for all sequences of the group

    @property
    def num_rows(self) -> int:
        return sum(self.prompt_rows) + len(self.group.sequences) * (1 + len(self.draft))


@dataclass(slots=True, eq=False)
class PrefillRows:
    """The next `count` positions of a sequence, none of them sampled. `members`: those whose tails run over them.
    `trunk_cached`: their blocks hold the trunk already."""

    group: Group
    sequence: Sequence
    count: int
    members: tuple[int, ...]
    trunk_cached: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledBatch:
    """A batch, and the groups and sequences of its rows: `Scheduler.schedule` returns it, `commit` or `fail` takes
    it."""

    batch: Batch
    decodes: list[GroupRows]  # in the order of the batch's samples
    prefills: list[PrefillRows]


@dataclass(frozen=True, slots=True)
class GroupTokens:
    """The tokens that a step drew for a group: samples `first`…`first + count - 1` of the output."""

    group: Group
    first: int
    count: int
    reason: FinishReason | None  # why the answer ends with the last of them; None if it goes on
    error: str | None  # why no more tokens could be drawn; None if there was no error
    scored_ids: tuple[int, ...] = ()  # the first of them are these tokens of the prompt (`Group.unscored`)


def num_rows(decodes: list[GroupRows], prefills: list[PrefillRows]) -> int:
    return sum(decode.num_rows for decode in decodes) + sum(prefill.count for prefill in prefills)


def pack(decodes: list[GroupRows], prefills: list[PrefillRows], block_size: int, freed_blocks: list[int]) -> Batch:
    """Lay out a batch of at least one row: the sequences of `decodes` first, then those of `prefills`."""
    parts = [(s, [*s.tokens.tail(s.num_computed), *d.draft.tolist()]) for d in decodes for s in d.group.sequences]
    members = [sequence.members for sequence, _ in parts] + [p.members for p in prefills]
    trunk_cached = [False] * len(parts) + [p.trunk_cached for p in prefills]
    parts += [(p.sequence, p.sequence.tokens.tail(p.sequence.num_computed, p.count)) for p in prefills]
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    first_sampled: dict[Sequence, int] = {}  # row of the sequence's last token
    width = max(len(sequence.block_table) for sequence, _ in parts)
    tables = []
    given: list[tuple[range, npt.NDArray[np.float32]]] = []  # rows of the batch, their embeddings
    for sequence, ids in parts:
        table, first = sequence.block_table, sequence.num_computed
        given += _embedded(sequence, first, len(ids), len(token_ids))
        first_sampled[sequence] = len(token_ids) + sequence.num_prefill
        token_ids += ids
        own = range(first, first + len(ids))
        positions += own
        slots += [table[position // block_size] * block_size + position % block_size for position in own]
        starts.append(len(token_ids))
        tables.append(table + [-1] * (width - len(table)))
    return Batch(
        token_ids=np.array(token_ids, np.int64),
        positions=np.array(positions, np.int32),
        slot_mapping=np.array(slots, np.int64),
        cu_seqlens_q=np.array(starts, np.int32),
        context_lens=np.array([sequence.num_computed + len(ids) for sequence, ids in parts], np.int32),
        block_tables=np.array(tables, np.int32),
        members=members,
        trunk_cached=np.array(trunk_cached, np.bool_),
        samples=[row for decode in decodes for row in _sample_rows(decode, first_sampled)],
        freed_blocks=np.array(freed_blocks, np.int32),
        embedded=EmbeddedRows(
            np.concatenate([np.array(rows, np.int32) for rows, _ in given]),
            np.concatenate([values for _, values in given]),
        )
        if given
        else None,
    )


def _embedded(sequence: Sequence, first: int, count: int, row: int) -> Iterator[tuple[range, npt.NDArray[np.float32]]]:
    """Of positions first…first + count - 1, which the batch has from `row` on: the rows whose embeddings are given, and these."""
    for span in sequence.embedded:
        start, end = max(span.start, first), min(span.end, first + count)
        if start < end:
            yield range(row + start - first, row + end - first), span.rows[start - span.start : end - span.start]


def _sample_rows(decode: GroupRows, first_sampled: dict[Sequence, int]) -> list[SampleRow]:
    """One sample for the last token and one per draft token: each as if the draft were right up to it."""
    group = decode.group
    num_tokens = len(group.sequences[0].tokens)
    forced = group.unscored[: 1 + len(decode.draft)].tolist()
    edits_of = [(force(token_id), group.scoring) for token_id in forced]
    if len(edits_of) <= len(decode.draft):  # the rows after the prompt draw the answer
        drawn = group.editor.edits_along(decode.draft[len(forced) :].tolist())
        edits_of += [(edits, group.sampling) for edits in drawn]
    return [
        SampleRow(
            terms=tuple((first_sampled[group.sequences[s]] + ahead, member, c) for s, member, c in group.terms),
            space=group.space,
            sampling=sampling,
            position=num_tokens + ahead,
            edits=edits,
            temperatures=group.temperatures,
        )
        for ahead, (edits, sampling) in enumerate(edits_of)
    ]
