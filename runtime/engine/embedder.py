"""`Embedder`: embeddings of prompts, computed a piece at a time between the engine's steps."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import numpy.typing as npt

from ..api.config import EngineConfig
from ..api.model_info import ModelInfo
from ..api.request import Ensemble, Owner
from ..backends.base import Backend
from ..errors import (
    ContextLengthError,
    InvalidEnsembleError,
    InvalidRequestError,
    MotetError,
    OverloadedError,
    UnavailableError,
    UnimplementedError,
)
from ..schedule.background import EVERY
from ..schedule.batch import Batch
from ..schedule.blocks import BlockManager
from .inbox import Inbox

log = logging.getLogger("motet.engine")
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
_BUSY_ROWS = 64  # of a piece, while requests run: they wait for it
_BUSY_SHARE = 1 / 4  # of the cache, while requests run


@dataclass(slots=True, eq=False)
class EmbedJob:
    """One prompt. `on_done` is called on the engine's thread, with the embedding or an error, once."""

    prompt: tuple[int, ...]
    ensemble: Ensemble
    on_done: Callable[[F32 | MotetError], None]
    owner: Owner = field(default_factory=Owner)  # batch work is computed behind all others
    is_cancelled: bool = False  # see `Embedder.cancel`
    terms: tuple[tuple[int, float], ...] = ()  # (member, coefficient)
    members: tuple[int, ...] = ()  # ascending
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    sums: F64 | None = None  # [members, hidden] of the hidden states so far

    @property
    def is_background(self) -> bool:
        return self.owner.is_background


class _Queue:
    """Jobs that wait; tenants take turns."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, deque[EmbedJob]] = OrderedDict()  # tenant → its jobs; whose turn it is comes first
        self.tokens: Counter[str] = Counter()  # by tenant

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def __iter__(self) -> Iterator[EmbedJob]:
        for jobs in self._jobs.values():
            yield from jobs

    def add(self, job: EmbedJob, *, is_first: bool = False) -> None:
        jobs = self._jobs.setdefault(job.owner.tenant, deque())
        jobs.appendleft(job) if is_first else jobs.append(job)
        self.tokens[job.owner.tenant] += len(job.prompt)

    def first(self) -> EmbedJob:
        return next(iter(self._jobs.values()))[0]

    def remove(self, job: EmbedJob) -> None:
        tenant = job.owner.tenant
        self._jobs[tenant].remove(job)
        self._jobs.move_to_end(tenant)
        self.tokens[tenant] -= len(job.prompt)
        if not self._jobs[tenant]:
            del self._jobs[tenant], self.tokens[tenant]


class Embedder:
    """The embedding of a prompt is Σ mix · mean over its tokens of the member's final hidden states, scaled to length 1.

    `submit` may be called from any thread; the rest belongs to the engine's. No prefix is shared.
    """

    def __init__(self, backend: Backend, model: ModelInfo, config: EngineConfig, inbox: Inbox) -> None:
        self._backend, self._model, self._inbox = backend, model, inbox
        self._num_steps = 0  # since batch work had one, while requests ran
        self._most_rows, self._most_jobs = config.max_num_batched_tokens, config.max_num_seqs
        self._most_tokens = config.max_waiting_tokens
        self._lock = Lock()
        self._waiting = (_Queue(), _Queue())  # others, batch work
        self._is_any_cancelled = False
        self._running: list[EmbedJob] = []
        self._is_closed = False

    @property
    def is_idle(self) -> bool:
        return not any(self._waiting) and not self._running

    def submit(self, jobs: Sequence[EmbedJob]) -> None:
        """Queue prompts, all or none. Raises `InvalidEnsembleError`, `InvalidRequestError`, `ContextLengthError`,
        `OverloadedError`, `UnavailableError` (draining or closed), `UnimplementedError` (the model has no hidden states)."""
        if not self._backend.has_hidden:
            raise UnimplementedError(
                f"'{self._model.name}' is an ONNX graph that gives logits and no hidden states, so it makes no embeddings; "
                "serve a bundle that was exported from the model's directory"
            )
        for job in jobs:
            self._check(job)
        with self._lock:
            if self._is_closed or self._inbox.is_draining:
                raise UnavailableError("the engine is shutting down; send the request to another server")
            self._check_room(jobs)
            for job in jobs:
                self._waiting[job.is_background].add(job)
        self._inbox.wake()

    def cancel(self, jobs: Sequence[EmbedJob]) -> None:
        """From any thread. `on_done` is still called for those that have not ended."""
        for job in jobs:
            job.is_cancelled = True
        self._is_any_cancelled = True
        self._inbox.wake()

    def _check_room(self, jobs: Sequence[EmbedJob]) -> None:
        """A tenant's texts, and those of batch work, may be half of those that wait: others find room too."""
        owner = jobs[0].owner
        new = sum(len(job.prompt) for job in jobs)
        others, batch = (queue.tokens for queue in self._waiting)
        own, most = others[owner.tenant] + batch[owner.tenant], self._most_tokens
        for queued, limit in (
            (others.total() + batch.total(), most),
            (own, most // 2 if owner.tenant else most),
            (batch.total(), most // 2 if owner.is_background else most),
        ):
            if queued and queued + new > limit:
                raise OverloadedError(
                    f"texts of {queued} tokens wait to be embedded and {new} more exceed {limit} (max_waiting_tokens is "
                    f"{most}; a tenant, and batch work, may have half); try again later"
                )

    def _check(self, job: EmbedJob) -> None:
        if not job.prompt:
            raise InvalidRequestError("the text to embed is empty; it needs at least one token", field="input")
        if len(job.prompt) > self._model.max_model_len:
            raise ContextLengthError(
                f"the text has {len(job.prompt)} tokens, the context holds {self._model.max_model_len}; divide it",
                field="input",
            )
        if -(-len(job.prompt) // self._backend.block_size) > self._backend.num_blocks:
            raise ContextLengthError(
                f"the text has {len(job.prompt)} tokens, more than the KV cache holds; divide it", field="input"
            )
        for token_id in (min(job.prompt), max(job.prompt)):
            if not 0 <= token_id < self._model.vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is not in 0…{self._model.vocab_size - 1}", field="input"
                )
        names = list(self._model.members)
        for member in job.ensemble.members:
            if member.name not in names:
                raise InvalidEnsembleError(
                    f"'{member.name}' is not a member of '{self._model.name}'; its members are {names}",
                    field="ensemble.members.name",
                )
        job.terms = tuple((names.index(member.name), member.mix) for member in job.ensemble.members)
        job.members = tuple(sorted({member for member, _ in job.terms}))

    def step(self, blocks: BlockManager, *, is_busy: bool, is_short: bool = False, may_start: bool = True) -> bool:
        """Compute the next rows of some jobs. False: the backend failed, and it is unknown what the step left in the cache.

        `is_busy`: requests that are not batch work run or wait; `is_short`: some of them wait. `may_start` False: a request
        waits for blocks and none runs, so new jobs leave it those that become free.
        """
        self._drop_cancelled(blocks)
        self._give_way(blocks, is_busy, is_short)
        if may_start:
            self._start(blocks, is_busy, is_short)
        self._num_steps += 1
        jobs = [job for job in self._running if not job.is_background]
        if not is_busy or self._num_steps >= EVERY:
            jobs += [job for job in self._running if job.is_background]
            self._num_steps = 0
        parts = self._next_rows(jobs, _BUSY_ROWS if is_busy else self._most_rows)
        if not parts:
            return True
        try:
            states = self._backend.hidden(_batch(parts, blocks))
        except Exception:
            log.exception("a step of embeddings failed; its requests end with an error")
            blocks.forget()  # it is unknown what the step left in the cache
            for job, _ in parts:
                self._end(
                    job, blocks, MotetError("the backend failed in a step of this request; the log has the error")
                )
            return False
        for (job, count), found in zip(parts, states, strict=True):
            total = found.sum(axis=1, dtype=np.float64)
            job.sums = total if job.sums is None else job.sums + total
            job.num_computed += count
            if job.num_computed == len(job.prompt):
                self._end(job, blocks, _embedding(job))
        return True

    def _give_way(self, blocks: BlockManager, is_busy: bool, is_short: bool) -> None:
        """Batch jobs that others need the places or blocks of begin again later. Beside other work one may run, while none of it
        waits."""
        first = self._waiting[0].first() if self._waiting[0] else None
        running = [job for job in self._running if job.is_background]
        kept = 0 if is_short else 1 if is_busy else len(running)
        while running and (len(running) > kept or (first is not None and not self._fits(first, blocks, is_busy))):
            job = running.pop()
            self._running.remove(job)
            blocks.free(job.blocks)
            job.blocks, job.num_computed, job.sums = [], 0, None
            with self._lock:
                self._waiting[1].add(job, is_first=True)

    def _drop_cancelled(self, blocks: BlockManager, gone: MotetError | None = None) -> None:
        if not self._is_any_cancelled:
            return
        self._is_any_cancelled = False  # before they are looked for: others may come meanwhile
        gone = gone or MotetError("the request was cancelled")
        for job in [job for job in self._running if job.is_cancelled]:
            self._end(job, blocks, gone)
        with self._lock:
            dropped = [job for queue in self._waiting for job in queue if job.is_cancelled]
            for job in dropped:
                self._waiting[job.is_background].remove(job)
        for job in dropped:
            job.on_done(gone)

    def _start(self, blocks: BlockManager, is_busy: bool, is_short: bool) -> None:
        while self._waiting[0] or (self._waiting[1] and not is_short):
            with self._lock:
                queue = self._waiting[0] or self._waiting[1]
                job = queue.first()
                if not self._fits(job, blocks, is_busy):
                    return
                queue.remove(job)
            job.blocks = blocks.allocate(blocks.blocks_for(len(job.prompt)))
            self._running.append(job)

    def _fits(self, job: EmbedJob, blocks: BlockManager, is_busy: bool) -> bool:
        """Whether a job may start. Beside other work jobs hold a part of the cache, or it is one job."""
        count = blocks.blocks_for(len(job.prompt))
        if len(self._running) >= self._most_jobs or not blocks.can_allocate(count):
            return False
        if not is_busy or not self._running:
            return True
        held = sum(len(other.blocks) for other in self._running)
        return not job.is_background and held + count <= _BUSY_SHARE * blocks.num_blocks

    def _next_rows(self, jobs: Sequence[EmbedJob], room: int) -> list[tuple[EmbedJob, int]]:
        """(job, rows), in the order of the jobs."""
        parts = []
        for job in jobs:
            count = min(room, len(job.prompt) - job.num_computed)
            if count:
                parts.append((job, count))
                room -= count
        return parts

    def _end(self, job: EmbedJob, blocks: BlockManager, result: F32 | MotetError) -> None:
        self._running.remove(job)
        blocks.free(job.blocks)
        job.on_done(result)

    def fail(self, error: MotetError, *, close: bool = False) -> None:
        """End all jobs, whose blocks are gone with their manager."""
        with self._lock:
            self._is_closed |= close
            jobs = [*self._running, *self._waiting[0], *self._waiting[1]]
            self._running.clear()
            self._waiting = (_Queue(), _Queue())
        for job in jobs:
            job.on_done(error)

    def end_all(self, blocks: BlockManager) -> None:
        """End all jobs, because the server goes out of service."""
        with self._lock:
            jobs = [*self._running, *self._waiting[0], *self._waiting[1]]
        self.cancel(jobs)
        self._drop_cancelled(
            blocks, UnavailableError("the server goes out of service; send the request to another one")
        )


def _batch(parts: Sequence[tuple[EmbedJob, int]], blocks: BlockManager) -> Batch:
    size = blocks.block_size
    spans = [np.arange(job.num_computed, job.num_computed + count) for job, count in parts]
    tables = [np.array(job.blocks, np.int32) for job, _ in parts]
    width = max(map(len, tables))
    return Batch(
        token_ids=np.concatenate([np.array(job.prompt)[span] for (job, _), span in zip(parts, spans)]).astype(np.int64),
        positions=np.concatenate(spans).astype(np.int32),
        slot_mapping=np.concatenate(
            [table[span // size].astype(np.int64) * size + span % size for table, span in zip(tables, spans)]
        ),
        cu_seqlens_q=np.cumsum([0, *(count for _, count in parts)]).astype(np.int32),
        context_lens=np.array([job.num_computed + count for job, count in parts], np.int32),
        block_tables=np.stack([np.pad(table, (0, width - len(table)), constant_values=-1) for table in tables]),
        members=[job.members for job, _ in parts],
        trunk_cached=np.zeros(len(parts), np.bool_),
        samples=[],
        freed_blocks=np.array(blocks.take_freed(), np.int32),
    )


def _embedding(job: EmbedJob) -> F32 | MotetError:
    assert job.sums is not None
    mixed = sum(mix * job.sums[job.members.index(member)] for member, mix in job.terms)
    length = float(np.linalg.norm(mixed))
    if not np.isfinite(length) or length == 0:
        return MotetError("the hidden states of this text hold NaN or infinity, or are 0")
    return np.asarray(mixed / length, np.float32)
