"""A deterministic backend for tests of the engine. Its "logits" are a hash of what its KV cache really holds, so a wrong
slot, block or position changes the tokens; it also asserts the invariants of every batch.

A slot holds, for the trunk and for each member that ran over it, a value chained from the value before it and the token: as in
a model, keys and values depend on all that precedes, and a member that did not run has none.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.model_info import ModelInfo
from motet.runtime.api.output import Output
from motet.runtime.api.request import Ensemble, Member, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.engine.engine import Engine
from motet.runtime.sampling.host import sample_rows
from motet.runtime.schedule.batch import Batch, ResolvedSampling, SampleRow, StepOutput


class FakeBackend:
    name = "fake"
    kv_dtype = "float32"
    has_hidden = True
    takes_embedded = True

    def __init__(
        self,
        num_blocks: int = 32,
        block_size: int = 8,
        vocab_size: int = 256,
        *,
        num_members: int = 3,
        order: int | None = None,
        can_sample_prefill: bool = False,
        keeps_trunk: bool = False,
    ) -> None:
        self.can_sample_prefill = can_sample_prefill
        self.keeps_trunk = keeps_trunk
        self.order = (
            order  # logits depend on the last so many tokens only, so that the text repeats itself; None: on all
        )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.tokens = np.full(num_blocks * block_size, -1, np.int64)  # [slots]
        self.given = np.zeros(num_blocks * block_size, np.int64)  # [slots] of what was embedded; 0: a token
        self.trunk = np.full(num_blocks * block_size, -1, np.int64)  # [slots]
        self.values = np.full((num_members, num_blocks * block_size), -1, np.int64)  # [members, slots]
        self.batches: list[tuple[int, int]] = []  # (rows, samples)
        self.fail_next = False
        self.nan_seeds: set[int] = set()
        self.answers: dict[int, _Answer] = {}  # of each group, by the identity of its parameters
        self.on_step: Callable[[Batch], object] = lambda batch: None  # called before anything is written
        self.closed = 0

    @property
    def can_verify(self) -> bool:
        return True

    def close(self) -> None:
        self.closed += 1

    def seconds(self) -> dict[str, float]:
        return {"all": 0.25}

    def score(self, token_ids: Sequence[int], member: int) -> npt.NDArray[np.float32]:
        count = len(token_ids)
        batch = Batch(
            token_ids=np.array(token_ids, np.int64),
            positions=np.arange(count, dtype=np.int32),
            slot_mapping=np.arange(count, dtype=np.int64),
            cu_seqlens_q=np.array([0, count], np.int32),
            context_lens=np.array([count], np.int32),
            block_tables=np.arange(-(-count // self.block_size), dtype=np.int32)[None],
            members=[(member,)],
            trunk_cached=np.zeros(1, np.bool_),
            samples=[],
            freed_blocks=np.empty(0, np.int32),
        )
        self._check(batch)
        return np.stack([self._logits(batch, row, member) for row in range(count)])

    def hidden(self, batch: Batch) -> list[npt.NDArray[np.float32]]:
        """Four numbers a row, of what its slot holds."""
        self.on_step(batch)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the fake backend was told to fail")
        self._check(batch)
        found = []
        for sequence, members in enumerate(batch.members):
            rows = slice(batch.cu_seqlens_q[sequence], batch.cu_seqlens_q[sequence + 1])
            held = self.values[np.array(members)][:, batch.slot_mapping[rows]]
            found.append(np.stack([(held >> shift) % 97 - 48 for shift in (0, 7, 14, 21)], axis=-1).astype(np.float32))
        return found

    def step(self, batch: Batch) -> StepOutput:
        self.on_step(batch)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the fake backend was told to fail")
        self._check(batch)
        self.batches.append((batch.num_rows, len(batch.samples)))
        rows, terms = [], []
        for sample in batch.samples:
            self._check_sample(batch, sample)
            terms.append([(len(rows) + i, c) for i, (_, _, c) in enumerate(sample.terms)])
            for (row, member, _), temperature in zip(sample.terms, sample.temperatures or [1.0] * len(sample.terms)):
                logits = self._logits(batch, row, member) / np.float32(temperature)
                rows.append(np.full_like(logits, np.nan) if sample.sampling.seed in self.nan_seeds else logits)
        output = sample_rows(np.array(rows, np.float32).reshape(-1, self.vocab_size), terms, batch.samples)
        for sample, token_id in zip(batch.samples, output.token_ids.tolist(), strict=True):
            answer = self.answers[id(sample.sampling)]
            answer.token_ids[sample.position - answer.first :] = [token_id]
        return output

    def _logits(self, batch: Batch, row: int, member: int) -> np.ndarray:
        slots = self._slots(batch, row)
        held = self.values[member, slots]
        assert (held >= 0).all(), "a row attends to a slot that was never written"
        if self.order is not None:
            held = self.tokens[slots[-self.order :]]
        seed = zlib.crc32(held.tobytes())
        return np.random.default_rng(seed).standard_normal(self.vocab_size).astype(np.float32) * 2

    def _slots(self, batch: Batch, row: int) -> np.ndarray:
        """Slots that a row attends to: its own and those before it."""
        table = batch.block_tables[_sequence_of(batch, row)]
        at = np.arange(batch.positions[row] + 1)
        return table[at // self.block_size] * self.block_size + at % self.block_size

    def _check(self, batch: Batch) -> None:
        for block in batch.freed_blocks:
            dead = slice(block * self.block_size, (block + 1) * self.block_size)
            self.tokens[dead] = self.trunk[dead] = self.values[:, dead] = -1
        starts = batch.cu_seqlens_q
        assert starts[0] == 0
        assert starts[-1] == batch.num_rows
        assert len(set(batch.slot_mapping.tolist())) == batch.num_rows, "two rows write one slot"
        assert self.keeps_trunk or not batch.trunk_cached.any(), "the trunk's output is not kept"
        used = [b for table in batch.block_tables for b in table.tolist() if b >= 0]
        whole = ~np.repeat(batch.trunk_cached, np.diff(starts))  # rows that the trunk runs over
        written = set((batch.slot_mapping[whole] // self.block_size).tolist())
        assert all(used.count(block) == 1 for block in written), "a shared block is written"
        for sequence in range(batch.num_seqs):
            self._write(batch, sequence)

    def _write(self, batch: Batch, sequence: int) -> None:
        rows = slice(batch.cu_seqlens_q[sequence], batch.cu_seqlens_q[sequence + 1])
        first, end = batch.context_lens[sequence] - (rows.stop - rows.start), batch.context_lens[sequence]
        assert batch.positions[rows].tolist() == list(range(first, end))
        slots = self._slots(batch, rows.stop - 1)
        assert (slots[first:] == batch.slot_mapping[rows]).all()
        assert batch.members[sequence], "no member needs these rows"
        if batch.trunk_cached[sequence]:
            assert (self.tokens[slots[first:]] == batch.token_ids[rows]).all(), "the trunk of other tokens"
            assert (self.trunk[slots[first:]] >= 0).all(), "the trunk was not computed, or its blocks were freed"
        else:
            self.tokens[slots[first:]] = batch.token_ids[rows]
            self.given[slots[first:]] = _given(batch)[rows]
            self._chain(self.trunk, slots, first, "")
        for member in batch.members[sequence]:
            missing = self.values[member, slots[first:]] < 0
            assert missing.all() or not batch.trunk_cached[sequence], "what is cached is computed again"
            self._chain(self.values[member], slots, first, f" {member}")

    def _chain(self, held: np.ndarray, slots: np.ndarray, first: int, who: str) -> None:
        """Fill the slots from position `first` on."""
        assert (held[slots[:first]] >= 0).all(), "the context was not computed, or its blocks were freed"
        for position in range(first, len(slots)):
            before = int(held[slots[position - 1]]) if position else 0
            given = f" given {self.given[slots[position]]}" if self.given[slots[position]] else ""
            held[slots[position]] = zlib.crc32(f"{before} {self.tokens[slots[position]]}{given}{who}".encode())

    def _check_sample(self, batch: Batch, sample: SampleRow) -> None:
        """The cache holds the tokens that the sample is drawn after: its first view all of them, and every view the same
        answer at its end, which begins with what was drawn for the group in the steps before, but for a draft."""
        assert all(member in batch.members[_sequence_of(batch, row)] for row, member, _ in sample.terms)
        held = {row: self.tokens[self._slots(batch, row)].tolist() for row, _, _ in sample.terms}
        text = held[min(held)]
        assert sample.position == len(text)
        known = self.answers.setdefault(id(sample.sampling), _Answer(sample.sampling, sample.position, []))
        answer = text[known.first :]
        assert all(tokens[len(tokens) - len(answer) :] == answer for tokens in held.values())
        own = [other.position for other in batch.samples if other.sampling is sample.sampling]
        drawn = min(own) - known.first
        assert answer[:drawn] == known.token_ids[:drawn]


@dataclass(slots=True)
class _Answer:
    sampling: ResolvedSampling  # kept, so that no other group has its identity
    first: int  # position of the first token
    token_ids: list[int]


def _given(batch: Batch) -> np.ndarray:
    """[rows] a number of each embedding that is given; 0: there is none."""
    found = np.zeros(batch.num_rows, np.int64)
    if batch.embedded is not None:
        assert (np.diff(batch.embedded.rows) > 0).all()
        found[batch.embedded.rows] = [1 + zlib.crc32(values.tobytes()) for values in batch.embedded.values]
    return found


def _sequence_of(batch: Batch, row: int) -> int:
    return int(np.searchsorted(batch.cu_seqlens_q, row, side="right")) - 1


# ---- an engine over it ------------------------------------------------------------------------------------------------

SOLO = Ensemble((Member("a", 1.0),))


def make_engine(tokenizer, backend=None, *, observers=(), **config) -> Engine:
    values = {"max_num_seqs": 8, "max_model_len": 96, "max_num_batched_tokens": 16, "prefill_chunk": 8} | config
    backend = backend or FakeBackend()
    model = ModelInfo("fake", ("a", "b", "c"), SOLO, (255,), backend.vocab_size, values["max_model_len"], hidden_size=4)
    return Engine(backend, tokenizer, model, EngineConfig(**values), observers)


def ask(
    name, prompt=(1, 2, 3), *, views=(), ensemble=SOLO, time_limit_s=None, cache_salt=b"", embedded=(), **params
) -> Request:
    params = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params
    sampling = SamplingParams(**params)
    options = {"time_limit_s": time_limit_s, "cache_salt": cache_salt, "embedded": embedded}
    return Request(name, (tuple(prompt), *views), ensemble, sampling, **options)


def start(engine, batch):
    """Submit requests; the result waits for their ends and gives (request id, choice) → all of its deltas in one."""
    outputs, done = {}, threading.Semaphore(0)

    def on_output(delta):
        whole = outputs.setdefault((delta.request_id, delta.choice), Output(delta.request_id, delta.choice, delta.seed))
        whole.extend(delta)
        if delta.finish_reason is not None:
            done.release()

    with engine._inbox._changed:  # they arrive together
        for request in batch:
            engine.submit(request, on_output)

    def wait():
        for _ in range(sum(request.sampling.n for request in batch)):
            assert done.acquire(timeout=30), "a choice has not ended"
        return outputs

    return wait


def gather(engine, batch):
    return start(engine, batch)()


def hold_first_step(backend: FakeBackend):
    """(set when the backend is in its next step, set to let it go on)."""
    assert isinstance(backend, FakeBackend), "the backend is held, not the engine"
    held, go = threading.Event(), threading.Event()

    def on_step(_batch):
        held.set()
        assert go.wait(timeout=30)

    backend.on_step = on_step
    return held, go
