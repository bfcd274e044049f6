"""`pack`: what the scheduler chose, laid out as a `Batch`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .batch import Batch, SampleRow
from .sequence import Group, Sequence

I64 = npt.NDArray[np.int64]


def _no_draft() -> I64:
    return np.empty(0, np.int64)


@dataclass(slots=True, eq=False)
class DecodeRows:
    """A group that is sampled: in each of its sequences a row for the last token and one for each token of the draft."""

    group: Group
    draft: I64 = field(default_factory=_no_draft)  # [drafted], the same for all sequences of the group

    @property
    def num_rows(self) -> int:
        return len(self.group.sequences) * (1 + len(self.draft))


@dataclass(slots=True, eq=False)
class PrefillRows:
    """The next `count` positions of a sequence; none is sampled."""

    sequence: Sequence
    count: int


def pack(decodes: list[DecodeRows], prefills: list[PrefillRows], block_size: int, freed_blocks: list[int]) -> Batch:
    """The batch of at least one row: sequences of `decodes` first, then those of `prefills`."""
    parts = [(s, np.append(s.tokens.view()[s.num_computed :], d.draft)) for d in decodes for s in d.group.sequences]
    parts += [(p.sequence, p.sequence.tokens.view()[p.sequence.num_computed :][: p.count]) for p in prefills]
    tables = np.full((len(parts), max(len(sequence.block_table) for sequence, _ in parts)), -1, np.int32)
    positions, slots = [], []
    for table, (sequence, token_ids) in zip(tables, parts, strict=True):
        table[: len(sequence.block_table)] = sequence.block_table
        at = np.arange(sequence.num_computed, sequence.num_computed + len(token_ids))
        positions.append(at)
        slots.append(table[at // block_size].astype(np.int64) * block_size + at % block_size)
    starts = np.cumsum([0, *(len(token_ids) for _, token_ids in parts)], dtype=np.int32)
    first_row = {id(sequence): int(start) for (sequence, _), start in zip(parts, starts[:-1], strict=True)}
    return Batch(
        token_ids=np.concatenate([token_ids for _, token_ids in parts]),
        positions=np.concatenate(positions).astype(np.int32),
        slot_mapping=np.concatenate(slots),
        cu_seqlens_q=starts,
        context_lens=np.array([at[-1] + 1 for at in positions], np.int32),
        block_tables=tables,
        members=[sequence.members for sequence, _ in parts],
        deltas=np.array([sequence.delta for sequence, _ in parts], np.int32),
        samples=[row for decode in decodes for row in _sample_rows(decode, first_row)],
        freed_blocks=np.array(freed_blocks, np.int32),
    )


def _sample_rows(decode: DecodeRows, first_row: dict[int, int]) -> list[SampleRow]:
    """One for each row of the group's sequences: what is drawn there if the draft is right up to it."""
    group, first = decode.group, decode.group.sequences[0]
    tokens = group.output.view() if not len(decode.draft) else np.append(group.output.view(), decode.draft)
    forbidden = tuple(sorted(group.stop_ids))
    return [
        SampleRow(
            terms=tuple((first_row[id(group.sequences[s])] + ahead, member, c) for s, member, c in group.terms),
            space=group.space,
            params=group.params,
            seed=group.seed,
            position=len(first.tokens) + ahead,
            prompt_ids=first.tokens.view()[: first.num_prompt],
            output_ids=tokens[: len(group.output) + ahead],
            forbidden_ids=forbidden if len(group.output) + ahead < group.params.min_tokens else (),
            return_member_logprobs=group.return_member_logprobs,
        )
        for ahead in range(1 + len(decode.draft))
    ]
