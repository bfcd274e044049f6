"""`Scheduler`: which rows the next step computes. It knows nothing of text or tensors.

A sequence is prefilled up to its last token, in chunks cut at fixed multiples of `prefill_chunk`. The last token is a
decode row, as is every sampled token after it. So only decode rows are sampled, views of different lengths meet in
one step, and where a prompt is cut does not depend on the rest of the batch. If the backend can sample prefill, the
step that ends the prompts of a group computes their last tokens too.

If there is room, a step also has rows for a draft of what may come next, and all of them are sampled. A token drawn
at a draft row is kept if the draft up to that row equals the tokens drawn at the rows before it. Draws depend only on
the seed, the position and the tokens before, so an answer is the same with drafts and without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator
from itertools import chain

from ..api.request import FinishReason
from .background import BackgroundTurns, background, foreground
from .batch import StepOutput
from .blocks import BlockManager
from .drafts import StepLoad
from .packing import GroupRows, GroupTokens, PrefillRows, ScheduledBatch, num_rows, pack
from .queue import WaitingQueue, groups_over_share
from .sequence import Group, Sequence, SequenceStatus
from .sharing import PrefixSharing

_SHARED_PREFILL = 4  # where tenants share a server, prompts have this part of a step's rows
_SCORED_ROWS = 128  # of a step, of prompts whose tokens are scored: each goes through the head
# (group, its newest token) → the reason if the answer ends with it, else None.
EndOf = Callable[[Group, int], FinishReason | None]


class Scheduler:
    """Tenants take turns by the tokens that they were served (`WaitingQueue`); within a tenant it is first come, first served,
    but small groups may pass a large one. When blocks run out, the latest group frees all of its blocks and waits again.
    So does the latest group of a tenant that has more than its share, if another waits that has less.

    A step has at most `max_num_batched_tokens` rows, plus one prefill chunk if decode rows leave no room for any. While
    several tenants come, prompts have a quarter of that: who comes waits for the step that runs, which is as long as its
    rows. With `prefix_cache`, sequences that begin alike share full blocks, but not that of the last token: its row is computed.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefill_chunk: int,
        *,
        prefix_cache: bool = True,
        keeps_trunk: bool = False,
        sample_prefill: bool = False,
    ) -> None:
        self.blocks = blocks
        self.waiting = WaitingQueue()
        self.running: list[Group] = []
        self._max_num_seqs = max_num_seqs
        self._max_passed = 4 * max_num_seqs  # by so many groups a waiting one may be passed
        self._max_rows = max_num_batched_tokens
        self._prefill_chunk = min(prefill_chunk, max_num_batched_tokens)
        self._sharing = PrefixSharing(blocks, enabled=prefix_cache, keeps_trunk=keeps_trunk)
        self._sample_prefill = sample_prefill
        self._turns = BackgroundTurns()
        self.counts = Counter[
            str
        ]()  # since the start: preempted groups; drafted tokens, and those of them that were accepted

    def add(self, group: Group) -> None:
        self.waiting.add(group)

    def abort(self, group: Group) -> None:
        """Remove a group, queued or running, and free its blocks. Not between `schedule` and `commit`."""
        if group.status is SequenceStatus.RUNNING:
            self.running.remove(group)
            self.waiting.end(group)
        elif group.status is SequenceStatus.WAITING:
            self.waiting.remove(group)
        self._release(group)
        group.status = SequenceStatus.FINISHED

    def preempt(self, group: Group) -> None:
        """Free a running group's blocks and put it before its tenant's others. Its tokens are kept and recomputed
        later."""
        self.running.remove(group)
        self._release(group)
        group.status = SequenceStatus.WAITING
        group.num_preemptions += 1
        self.counts["preempted"] += 1
        self.waiting.put_back(group)

    def schedule(self) -> ScheduledBatch | None:
        """The next batch, to be passed to `commit` or `fail`; None if there is nothing to compute."""
        self._admit()
        self._adopt()
        self._turns.next_step()
        decodes = self._schedule_decode()
        prefills = self._schedule_prefill(num_rows(decodes, []))
        if self._sample_prefill:
            decodes, prefills = self._sample_ended_prompts(decodes, prefills)
        if not decodes and not prefills:
            return None
        self._schedule_drafts(decodes, num_rows(decodes, prefills))
        batch = pack(decodes, prefills, self.blocks.block_size, self.blocks.take_freed())
        return ScheduledBatch(batch, decodes, prefills)

    def commit(self, scheduled: ScheduledBatch, output: StepOutput, end_of: EndOf) -> list[GroupTokens]:
        """Append the drawn tokens to their groups, in the order of the output. `end_of` is called once per token,
        after the token was appended. Draft tokens after the last token of an answer are dropped."""
        for prefill in scheduled.prefills:
            self._sharing.advance(prefill.sequence, prefill.count)
            self.waiting.computed(prefill.group, prefill.count, 0)
        drawn, first = [], 0
        for decode in scheduled.decodes:
            drawn.append(self._commit_decode(decode, first, output, end_of))
            first += 1 + len(decode.draft)
        return drawn

    def _commit_decode(self, decode: GroupRows, first: int, output: StepOutput, end_of: EndOf) -> GroupTokens:
        """Keeps tokens up to and including the first that differs from the draft or ends the answer."""
        group, count, reason, error = decode.group, 0, None, None
        unscored = tuple(group.unscored[: 1 + len(decode.draft)].tolist())
        for ahead in range(1 + len(decode.draft)):
            error = output.errors.get(first + ahead)
            if error is not None:
                break
            token_id = int(output.token_ids[first + ahead])
            group.append(token_id)
            count += 1
            if count <= len(unscored):  # drawn by force, whatever came out
                continue
            reason = end_of(group, token_id)
            if reason is not None or ahead == len(decode.draft) or token_id != decode.draft[ahead]:
                break
        scored = min(count, len(unscored))
        self.waiting.computed(group, sum(decode.prompt_rows) + scored, (count - scored) * len(group.sequences))
        if not unscored:
            self.counts["drafted"] += len(decode.draft)
            self.counts["accepted"] += count - (error is None)
        for sequence, prompt_rows in zip(group.sequences, decode.prompt_rows, strict=True):
            if error is None:
                self._sharing.advance(sequence, prompt_rows + count)
            elif not group.is_stuck:
                self.blocks.forget(sequence.block_table)  # they may hold NaN: no other sequence may read them
        return GroupTokens(group, first, count, reason, error, unscored[:scored])

    def fail(self, scheduled: ScheduledBatch) -> list[Group]:
        """The batch failed: return its groups, which the caller ends. It is unknown what the step left in the cache,
        so the other running groups are preempted and nothing in the cache is shared any more."""
        self.blocks.forget()
        under_way = {prefill.sequence for prefill in scheduled.prefills}
        under_way |= {sequence for decode in scheduled.decodes for sequence in decode.group.sequences}
        failed = [group for group in self.running if not under_way.isdisjoint(group.sequences)]
        self.preempt_all(failed)
        return failed

    def preempt_all(self, but: Collection[Group] = ()) -> None:
        """The running groups wait again: it is unknown what the cache holds."""
        for group in [group for group in self.running if group not in but][::-1]:
            self.preempt(group)

    def check_integrity(self) -> None:
        """Assert that the running sequences' tables account for every used block (see `BlockManager.check_integrity`)."""
        self.blocks.check_integrity(s.block_table for group in self.running for s in group.sequences)

    # ---- steps of schedule() -------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start groups from the queue, in order. A group with fewer sequences may pass one that has to wait for room, but
        a limited number of times, so that no group waits for ever."""
        passed: list[Group] = []
        blocked: dict[str, int] = {}  # tenant → sequences of its smallest group that has to wait
        for group in self.waiting:
            tenant = group.owner.tenant
            if len(group.sequences) >= blocked.get(tenant, self._max_num_seqs + 1):
                continue
            if self._start(group):
                for other in passed:
                    other.num_passed += 1
                continue
            if self._make_room(group) and self._start(group):
                continue
            if group.num_passed >= self._max_passed:
                return
            passed.append(group)
            # A preempted group is not passed by its tenant's others: it holds the oldest of what was drawn.
            blocked[tenant] = 1 if group.num_preemptions else len(group.sequences)
            if len(blocked) == self.waiting.num_tenants and set(blocked.values()) == {1}:
                return

    def _make_room(self, group: Group) -> bool:
        """Preempt batch work, and groups of tenants that run more than their share, if this one can have their room."""
        if (victims := groups_over_share(group, self.running, self._max_num_seqs)) is None:
            return False
        missing = sum(self.blocks.blocks_for(len(s.tokens)) for s in group.sequences) - self.blocks.num_free
        for other in background(self.running)[::-1]:
            if other not in victims and self._held_by(victims) < missing:
                victims.append(other)
        if self._held_by(victims) < missing:
            return False
        for other in victims:
            self.preempt(other)
        return bool(victims)

    def _held_by(self, groups: Collection[Group]) -> int:
        """Blocks that nothing but these groups holds."""
        return self.blocks.count_freed(chain.from_iterable(s.block_table for group in groups for s in group.sequences))

    def _start(self, group: Group) -> bool:
        """Start a group of the queue if there are places for its sequences, and blocks for all of their tokens."""
        if sum(len(other.sequences) for other in self.running) + len(group.sequences) > self._max_num_seqs:
            return False
        shared = [self._sharing.shareable(sequence) for sequence in group.sequences]
        rest = [
            self.blocks.blocks_for(len(s.tokens)) - len(found) for s, found in zip(group.sequences, shared, strict=True)
        ]
        if not self.blocks.can_allocate(sum(rest), chain.from_iterable(shared)):
            return False
        size = self.blocks.block_size
        to_compute = sum(len(s.tokens) - size * len(found) for s, found in zip(group.sequences, shared, strict=True))
        to_compute += len(group.unscored)
        self.waiting.start(group, to_compute)
        self.blocks.retain(chain.from_iterable(shared))
        for sequence, found, count in zip(group.sequences, shared, rest, strict=True):
            sequence.block_table = found + self.blocks.allocate(count)
            self._sharing.take_over(group, sequence, len(found))
        group.status = SequenceStatus.RUNNING
        self.running.append(group)
        return True

    def _adopt(self) -> None:
        """Let running sequences share blocks that others have computed since they were admitted."""
        for group in self.running:
            for sequence in group.sequences:
                if not sequence.num_prefill:
                    continue
                self._sharing.skip(group, sequence)
                if found := self._sharing.shareable(sequence):
                    at = sequence.num_trunk // self.blocks.block_size
                    own = sequence.block_table[at : at + len(found)]
                    self.blocks.retain(found)
                    self.blocks.free(own)
                    sequence.block_table[at : at + len(found)] = found
                    self._sharing.take_over(group, sequence, len(found))

    def _schedule_decode(self) -> list[GroupRows]:
        """One row per sequence of every group whose prefill is complete, the oldest group first. Batch work comes last, and
        beside other work it has only as many rows as hardly slow the step: a group of more rows waits some steps for them."""
        decodes: list[GroupRows] = []
        rows = 0
        for group in (*foreground(self.running), *background(self.running)):
            if group.status is not SequenceStatus.RUNNING or any(s.num_prefill for s in group.sequences):
                continue
            count = len(group.sequences)
            if rows + count > self._max_rows and rows:
                break
            if group.owner.is_background and foreground(self.running) and not self._turns.may_draw(rows, count):
                break
            if not self._grow(group):
                continue
            rows += count
            decodes.append(GroupRows(group, [0] * count))
        return decodes

    def _grow(self, group: Group) -> bool:
        """Allocate blocks for the next row of each sequence. Preempts batch work and then the latest groups until there are
        enough, in the end the group itself; False then."""
        for sequence in group.sequences:
            while self._missing(sequence, 0):
                if self.blocks.can_allocate(1):
                    sequence.block_table += self.blocks.allocate(1)
                    continue
                victim = (background(self.running) or self.running)[-1]  # never one that is already in this step
                self.preempt(victim)
                if victim is group:
                    return False
        return True

    def _schedule_prefill(self, rows: int) -> list[PrefillRows]:
        """Whole chunks beside `rows` decode rows, in the order of `_prefilling`, as long as the step has room, and prompts their
        part of it, but at least one. A sequence whose next block is computed by another one in this step waits for it."""
        prefills: list[PrefillRows] = []
        under_way: set[Hashable] = set()
        limit = self._max_rows
        if self.waiting.is_shared:
            limit = min(limit, rows + self._max_rows // _SHARED_PREFILL)
        for group, sequence in self._prefilling():
            chunk = self._prefill_chunk - sequence.num_computed % self._prefill_chunk
            prefill = self._sharing.prefill(group, sequence, chunk)
            blocks = self._sharing.keys(sequence, prefill.count)
            if blocks and blocks[0] in under_way and sequence.num_computed % self.blocks.block_size == 0:
                continue
            if prefills and rows + prefill.count > limit:
                break
            prefills.append(prefill)
            if group.owner.is_background:
                self._turns.prefilled()
                if foreground(self.running):
                    break
            under_way.update(blocks)
            rows += prefill.count
        return prefills

    def _sample_ended_prompts(
        self, decodes: list[GroupRows], prefills: list[PrefillRows]
    ) -> tuple[list[GroupRows], list[PrefillRows]]:
        """If the prompts of a group end in this step and there is room for their last tokens, the group draws in this
        step: its prefill rows become rows of `decodes`."""
        rows = num_rows(decodes, prefills)
        ends = {p.sequence for p in prefills if p.count == p.sequence.num_prefill and not p.trunk_cached}
        drawing: list[GroupRows] = []
        for group in self.running:
            prompts = {sequence for sequence in group.sequences if sequence.num_prefill}
            last_tokens = len(group.sequences)
            if not prompts or not prompts <= ends or rows + last_tokens > self._max_rows:
                continue
            if not any(self._missing(sequence, 0) for sequence in group.sequences):
                drawing.append(GroupRows(group, [sequence.num_prefill for sequence in group.sequences]))
                rows += last_tokens
        sampled = {sequence for group_rows in drawing for sequence in group_rows.group.sequences}
        return decodes + drawing, [prefill for prefill in prefills if prefill.sequence not in sampled]

    def _prefilling(self) -> Iterator[tuple[Group, Sequence]]:
        """In the order of the queue's `prefill_order`. Beside other work, batch work has a chunk only now and then: each makes a
        token of the others late."""
        groups = self.running if self._turns.may_prefill else foreground(self.running)
        for group in sorted(groups or self.running, key=self.waiting.prefill_order):
            yield from ((group, sequence) for sequence in group.sequences if sequence.num_prefill)

    def _schedule_drafts(self, decodes: list[GroupRows], rows: int) -> None:
        """Add drafts to the groups that draw, within the rows and blocks that the step's `rows` leave free."""
        load, scored = StepLoad(rows, len(decodes)), _SCORED_ROWS
        for decode in decodes:
            group = decode.group
            if group.max_draft > 0 and not (group.owner.is_background and foreground(self.running)):
                room = min(self._max_rows - load.rows, scored if len(group.unscored) else self._max_rows)
                limit = self._fitting(group, min(max(room, 0) // len(group.sequences), group.max_draft))
                decode.draft = group.draft(limit, load)
                scored -= len(decode.draft) * len(group.sequences) if len(group.unscored) else 0
                for sequence in group.sequences:
                    sequence.block_table += self.blocks.allocate(self._missing(sequence, len(decode.draft)))

    def _fitting(self, group: Group, limit: int) -> int:
        """The longest draft, up to `limit` tokens, for which there are blocks."""
        while limit > 0 and not self.blocks.can_allocate(sum(self._missing(s, limit) for s in group.sequences)):
            limit -= 1
        return max(limit, 0)

    def _missing(self, sequence: Sequence, ahead: int) -> int:
        """How many more blocks the sequence needs for `ahead` positions after its last token."""
        return max(0, self.blocks.blocks_for(len(sequence.tokens) + ahead) - len(sequence.block_table))

    def _release(self, group: Group) -> None:
        for sequence in group.sequences:
            self.blocks.free(sequence.block_table)
            sequence.block_table = []
            sequence.num_computed = sequence.num_trunk = 0
