"""`Scheduler`: which rows the next step computes. It knows nothing of text or tensors.

A sequence is prefilled up to its last token, in chunks cut at fixed multiples of `prefill_chunk`; the last token is a
decode row, as is every sampled token after it. So the rows that are sampled are always decode rows, views of different
lengths meet in one step, and how a prompt is cut does not depend on who else is in the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain

import numpy as np

from .batch import Batch, SampleRow, StepOutput
from .blocks import BlockManager
from .prefix import extend_digests
from .sequence import Group, Sequence, SequenceStatus


class Scheduler:
    """First come, first served. When blocks run out, the latest group gives all of its blocks back and waits again.

    A step has at most `max_num_batched_tokens` rows, or one prefill chunk more where decode rows leave no room for any:
    so neither waits for the other. With `prefix_cache`, full blocks are shared between sequences that begin alike; the
    block of the last token never is, because its row must be computed.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefill_chunk: int,
        *,
        prefix_cache: bool = True,
    ) -> None:
        self.blocks = blocks
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []
        self._max_num_seqs = max_num_seqs
        self._max_rows = max_num_batched_tokens
        self._prefill_chunk = min(prefill_chunk, max_num_batched_tokens)
        self._prefix_cache = prefix_cache
        self._rows: list[tuple[Sequence, int]] = []  # of the batch under way: sequence, number of rows
        self._sampled: list[Group] = []

    def add(self, group: Group) -> None:
        self.waiting.append(group)

    def abort(self, group: Group) -> None:
        """Take a group out, wherever it is, and free its blocks. Not while a batch is under way."""
        if group.status is SequenceStatus.RUNNING:
            self.running.remove(group)
        elif group.status is SequenceStatus.WAITING:
            self.waiting.remove(group)
        self._release(group)
        group.status = SequenceStatus.FINISHED

    def preempt(self, group: Group) -> None:
        """Free a running group's blocks; it waits in front and is recomputed, its tokens are kept."""
        self.running.remove(group)
        self._release(group)
        group.status = SequenceStatus.WAITING
        group.num_preemptions += 1
        self.waiting.appendleft(group)

    def schedule(self) -> Batch | None:
        """The next batch, None if there is nothing to compute."""
        self._rows, self._sampled = [], []
        self._admit()
        self._adopt()
        self._schedule_decode()
        self._schedule_prefill()
        return self._batch() if self._rows else None

    def commit(self, output: StepOutput) -> list[Group]:
        """Append the drawn tokens; return the sampled groups in the order of the output. A group with an error in the
        output gets no token."""
        for sequence, count in self._rows:
            sequence.num_computed += count
        for index, group in enumerate(self._sampled):
            if index not in output.errors:
                group.append(int(output.token_ids[index]))
        for sequence, count in self._rows:
            self._publish(sequence, count)
        for index in output.errors:
            for sequence in self._sampled[index].sequences:  # nobody else shall read what may hold NaN
                self.blocks.forget(sequence.block_table)
        return self._sampled

    def fail(self) -> list[Group]:
        """The batch under way failed: return its groups, which the caller ends. The others that run are preempted,
        because nobody knows what the step left in the cache; for the same reason nothing in it is shared any more."""
        self.blocks.forget()
        under_way = {id(sequence) for sequence, _ in self._rows}
        failed = [group for group in self.running if any(id(s) in under_way for s in group.sequences)]
        for group in self.running[::-1]:
            if group not in failed:
                self.preempt(group)
        return failed

    def check_integrity(self) -> None:
        """Assert that every block is free or owned once."""
        self.blocks.check_integrity(s.block_table for group in self.running for s in group.sequences)

    # ---- steps of schedule() -------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Move groups from the queue while all their sequences find a place for all of their tokens."""
        num_seqs = sum(len(group.sequences) for group in self.running)
        while self.waiting:
            group = self.waiting[0]
            if num_seqs + len(group.sequences) > self._max_num_seqs:
                return
            shared = [self._shareable(sequence) for sequence in group.sequences]
            needed = sum(
                self.blocks.blocks_for(len(sequence.tokens)) - len(found)
                for sequence, found in zip(group.sequences, shared, strict=True)
            )
            if not self.blocks.can_allocate(needed, chain.from_iterable(shared)):
                return
            self.waiting.popleft()
            self.blocks.share(chain.from_iterable(shared))
            for sequence, found in zip(group.sequences, shared, strict=True):
                rest = self.blocks.blocks_for(len(sequence.tokens)) - len(found)
                sequence.block_table = found + self.blocks.allocate(rest)
                self._take_over(group, sequence, len(found))
            group.status = SequenceStatus.RUNNING
            self.running.append(group)
            num_seqs += len(group.sequences)

    def _adopt(self) -> None:
        """What others have computed since a running sequence was admitted, it need not compute."""
        for group in self.running:
            for sequence in group.sequences:
                if sequence.num_prefill and (found := self._shareable(sequence)):
                    at = sequence.num_computed // self.blocks.block_size
                    own = sequence.block_table[at : at + len(found)]
                    self.blocks.share(found)
                    self.blocks.free(own)
                    sequence.block_table[at : at + len(found)] = found
                    self._take_over(group, sequence, len(found))

    def _shareable(self, sequence: Sequence) -> list[int]:
        """Blocks with the content that the sequence needs next."""
        done, odd = divmod(sequence.num_computed, self.blocks.block_size)
        if odd or not self._prefix_cache:
            return []
        digests = self._digests(sequence, (len(sequence.tokens) - 1) // self.blocks.block_size)
        return self.blocks.find(digests[done:], sequence.members)

    def _take_over(self, group: Group, sequence: Sequence, count: int) -> None:
        sequence.num_computed += count * self.blocks.block_size
        if not group.num_preemptions:
            sequence.num_cached += count * self.blocks.block_size

    def _digests(self, sequence: Sequence, count: int) -> list[bytes]:
        """Digests of the first `count` blocks, which must be full."""
        extend_digests(sequence.digests, sequence.delta, sequence.tokens.view(), count, self.blocks.block_size)
        return sequence.digests[:count]

    def _publish(self, sequence: Sequence, count: int) -> None:
        """Share the blocks that the last `count` positions have filled."""
        size = self.blocks.block_size
        full, before = sequence.num_computed // size, (sequence.num_computed - count) // size
        if self._prefix_cache and full > before:
            digests = self._digests(sequence, full)
            for index in range(before, full):
                self.blocks.publish(sequence.block_table[index], digests[index], sequence.members)

    def _schedule_decode(self) -> None:
        """One row a sequence of every group whose prefill is complete; the oldest first."""
        rows = 0
        for group in list(self.running):
            if group.status is not SequenceStatus.RUNNING or any(s.num_prefill for s in group.sequences):
                continue
            if rows + len(group.sequences) > self._max_rows and rows:
                break
            if not self._grow(group):
                continue
            rows += len(group.sequences)
            self._rows += [(sequence, 1) for sequence in group.sequences]
            self._sampled.append(group)

    def _grow(self, group: Group) -> bool:
        """Blocks for the row to be written; preempts the latest groups until there are, at last the group itself."""
        for sequence in group.sequences:
            while len(sequence.block_table) * self.blocks.block_size < len(sequence.tokens):
                if self.blocks.can_allocate(1):
                    sequence.block_table += self.blocks.allocate(1)
                    continue
                victim = self.running[-1]  # never one that is scheduled already: those are older
                self.preempt(victim)
                if victim is group:
                    return False
        return True

    def _schedule_prefill(self) -> None:
        """Whole chunks, the oldest group first, as long as the step has room; one at least. A sequence whose next block
        another one computes in this step waits for it."""
        rows = sum(count for _, count in self._rows)
        scheduled, under_way = 0, set[tuple[bytes, tuple[int, ...]]]()
        for sequence in self._prefilling():
            count = min(sequence.num_prefill, self._prefill_chunk - sequence.num_computed % self._prefill_chunk)
            blocks = self._shareable_later(sequence, count)
            if blocks and blocks[0] in under_way and sequence.num_computed % self.blocks.block_size == 0:
                continue
            if scheduled and rows + count > self._max_rows:
                return
            self._rows.append((sequence, count))
            under_way.update(blocks)
            scheduled, rows = scheduled + 1, rows + count

    def _shareable_later(self, sequence: Sequence, count: int) -> list[tuple[bytes, tuple[int, ...]]]:
        """(digest, members) of the blocks that the next `count` positions lie in and that prefill will fill."""
        if not self._prefix_cache:
            return []
        size, start = self.blocks.block_size, sequence.num_computed
        digests = self._digests(sequence, min(-(-(start + count) // size), (len(sequence.tokens) - 1) // size))
        return [(digest, sequence.members) for digest in digests[start // size :]]

    def _prefilling(self) -> Iterator[Sequence]:
        for group in self.running:
            yield from (sequence for sequence in group.sequences if sequence.num_prefill)

    def _release(self, group: Group) -> None:
        for sequence in group.sequences:
            self.blocks.free(sequence.block_table)
            sequence.block_table = []
            sequence.num_computed = 0

    # ---- the batch -----------------------------------------------------------------------------------------------

    def _batch(self) -> Batch:
        tables = np.full((len(self._rows), max(len(s.block_table) for s, _ in self._rows)), -1, np.int32)
        positions = []
        slots = []
        for index, (sequence, count) in enumerate(self._rows):
            tables[index, : len(sequence.block_table)] = sequence.block_table
            at = np.arange(sequence.num_computed, sequence.num_computed + count)
            positions.append(at)
            blocks = tables[index][at // self.blocks.block_size].astype(np.int64)
            slots.append(blocks * self.blocks.block_size + at % self.blocks.block_size)
        ends = [sequence.num_computed + count for sequence, count in self._rows]
        starts = np.cumsum([0] + [count for _, count in self._rows], dtype=np.int32)
        first_row = {id(sequence): int(start) for (sequence, _), start in zip(self._rows, starts)}
        return Batch(
            token_ids=np.concatenate([s.tokens.view()[s.num_computed : e] for (s, _), e in zip(self._rows, ends)]),
            positions=np.concatenate(positions).astype(np.int32),
            slot_mapping=np.concatenate(slots),
            cu_seqlens_q=starts,
            context_lens=np.array(ends, np.int32),
            block_tables=tables,
            members=[sequence.members for sequence, _ in self._rows],
            deltas=np.array([sequence.delta for sequence, _ in self._rows], np.int32),
            samples=[self._sample_row(group, first_row) for group in self._sampled],
            freed_blocks=np.array(self.blocks.take_freed(), np.int32),
        )

    def _sample_row(self, group: Group, first_row: dict[int, int]) -> SampleRow:
        early = len(group.output) < group.params.min_tokens
        return SampleRow(
            terms=tuple((first_row[id(group.sequences[s])], member, c) for s, member, c in group.terms),
            space=group.space,
            params=group.params,
            seed=group.seed,
            position=len(group.sequences[0].tokens),
            prompt_ids=group.sequences[0].tokens.view()[: group.sequences[0].num_prompt],
            output_ids=group.output.view(),
            forbidden_ids=tuple(sorted(group.stop_ids)) if early else (),
            return_member_logprobs=group.return_member_logprobs,
        )
