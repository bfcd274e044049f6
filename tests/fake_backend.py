"""A deterministic backend for tests of the engine. Its "logits" are a hash of what its KV cache really holds, so a wrong
slot, block or position changes the tokens; it also asserts the invariants of every batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from motet.runtime.batch import Batch, SampleRow, StepOutput
from motet.runtime.sampler import sample_rows


class FakeBackend:
    def __init__(self, num_blocks: int = 32, block_size: int = 8, vocab_size: int = 256) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.cache = np.full(num_blocks * block_size, -1, np.int64)
        self.batches: list[tuple[int, int]] = []  # (rows, samples)
        self.fail_next = False
        self.nan_seeds: set[int] = set()
        self.on_step: Callable[[Batch], None] = lambda batch: None  # called before anything is written
        self.closed = 0

    def close(self) -> None:
        self.closed += 1

    def step(self, batch: Batch) -> StepOutput:
        self.on_step(batch)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the fake backend was told to fail")
        self._check(batch)
        self.batches.append((batch.num_rows, len(batch.samples)))
        rows, terms = [], []
        for sample in batch.samples:
            terms.append([(len(rows) + i, c) for i, (_, _, c) in enumerate(sample.terms)])
            for sequence, member, _ in sample.terms:
                logits = self._logits(batch, sequence, member)
                rows.append(np.full_like(logits, np.nan) if sample.seed in self.nan_seeds else logits)
        return sample_rows(np.array(rows, np.float32).reshape(-1, self.vocab_size), terms, batch.samples)

    def _slots(self, batch: Batch, sequence: int) -> np.ndarray:
        at = np.arange(batch.context_lens[sequence])
        return batch.block_tables[sequence][at // self.block_size] * self.block_size + at % self.block_size

    def _logits(self, batch: Batch, sequence: int, member: int) -> np.ndarray:
        held = self.cache[self._slots(batch, sequence)]
        assert (held >= 0).all(), "a row attends to a slot that was never written"
        seed = zlib.crc32(held.tobytes() + bytes([member]))
        return np.random.default_rng(seed).standard_normal(self.vocab_size).astype(np.float32) * 2

    def _check(self, batch: Batch) -> None:
        for block in batch.freed_blocks:
            self.cache[block * self.block_size : (block + 1) * self.block_size] = -1
        starts = batch.cu_seqlens_q
        assert starts[0] == 0
        assert starts[-1] == batch.num_rows
        assert len(set(batch.slot_mapping.tolist())) == batch.num_rows, "two rows write one slot"
        used = [b for table in batch.block_tables for b in table if b >= 0]
        assert len(used) == len(set(used)), "two sequences share a block"
        for sequence in range(batch.num_seqs):
            rows = slice(starts[sequence], starts[sequence + 1])
            count = starts[sequence + 1] - starts[sequence]
            first = batch.context_lens[sequence] - count
            assert (batch.positions[rows] == np.arange(first, batch.context_lens[sequence])).all()
            slots = self._slots(batch, sequence)
            assert (self.cache[slots[:first]] >= 0).all(), "the context was not computed, or its blocks were freed"
            assert (slots[first:] == batch.slot_mapping[rows]).all()
            self.cache[slots[first:]] = batch.token_ids[rows]
        for sample in batch.samples:
            for sequence, member, _ in sample.terms:
                assert member in batch.members[sequence]
                assert starts[sequence + 1] - starts[sequence] == 1
            self._check_content(batch, sample)

    def _check_content(self, batch: Batch, sample: SampleRow) -> None:
        """The cache holds the tokens that the sample was drawn after: prompt and answer of its first view, and the same
        answer at the end of every view."""
        sequences = {sequence for sequence, _, _ in sample.terms}
        held = {sequence: self.cache[self._slots(batch, sequence)].tolist() for sequence in sequences}
        answer = sample.output_ids.tolist()
        assert [*sample.prompt_ids.tolist(), *answer] == held[min(sequences)]
        assert sample.position == len(held[min(sequences)])
        assert all(tokens[len(tokens) - len(answer) :] == answer for tokens in held.values())
