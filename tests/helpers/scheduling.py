"""A scheduler without an engine: groups of plain prompts, and steps whose tokens follow from their positions."""

from __future__ import annotations

import zlib

import numpy as np
from motet.runtime.api.request import Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.schedule.batch import StepOutput
from motet.runtime.schedule.blocks import BlockManager
from motet.runtime.schedule.resolve import LogitEditor
from motet.runtime.schedule.scheduler import Scheduler
from motet.runtime.schedule.sequence import Group, Sequence

MAX_ROWS, CHUNK = 16, 8


def make_scheduler(num_blocks=64, block_size=4, max_num_seqs=8, max_rows=MAX_ROWS, chunk=CHUNK, **options) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), max_num_seqs, max_rows, chunk, **options)


def make_group(name, *lengths, stop_ids=(), members=(0,), first=None, **params) -> Group:
    """Prompts 1, 2, 3 … for "a"; those of groups with other names have no token in common, unless `first` is said."""
    first = 1 + 1000 * (zlib.crc32(name.encode()) - zlib.crc32(b"a")) if first is None else first
    sequences = [Sequence(tuple(range(first, first + length)), members) for length in lengths]
    terms = tuple((index, 0, 1 / len(lengths)) for index in range(len(lengths)))
    sampling = SamplingParams(**params)
    editor = LogitEditor(sampling, stop_ids, range(first, first + lengths[0]))
    return Group(name, 0, sequences, terms, Space.LOGITS, sampling, 7, 99, frozenset(stop_ids), editor)


def answer(batch, errors=None) -> StepOutput:
    """Token 100 + position for every sample."""
    token_ids = np.array([100 + sample.position for sample in batch.samples], np.int64)
    return StepOutput(token_ids, np.zeros(len(token_ids), np.float32), [], [], [], errors or {})


def go_on(group, token_id):
    """No token is an answer's last."""


def chunks_of(batch):
    """[(first position, rows)] of every sequence of the batch, in order."""
    counts = np.diff(batch.cu_seqlens_q)
    return [(int(end - count), int(count)) for end, count in zip(batch.context_lens, counts, strict=True)]


def run(scheduler, steps=1):
    """The last batch of so many steps; all drawn tokens are committed."""
    batch = None
    for _ in range(steps):
        scheduled = scheduler.schedule()
        assert scheduled is not None
        batch = scheduled.batch
        scheduler.commit(scheduled, answer(batch), go_on)
        scheduler.check_integrity()
    return batch
