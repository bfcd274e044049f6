"""Batch work uses the room that other work leaves, and hardly slows it."""

from __future__ import annotations

import dataclasses
import time

from helpers.fake_backend import FakeBackend, ask, gather, make_engine, start
from helpers.servers import until
from motet.runtime.api.request import Ensemble, Member, Owner
from motet.runtime.schedule.background import EVERY, SHARE, spare_rows
from motet.runtime.schedule.drafts import ROW_COST

BATCH = Owner("", is_background=True)


def as_batch(request):
    return dataclasses.replace(request, owner=BATCH)


def test_room_is_an_eighth_of_the_step():
    for rows in (1, 2, 5, 16, 100):
        extra = spare_rows(rows)
        assert extra >= 1
        assert ROW_COST * extra <= max(ROW_COST, SHARE * (1 + ROW_COST * (rows - 1))) + 1e-9


def test_beside_other_work_it_has_few_rows(tokenizer):
    """Eight batch requests run; then one other comes. As long as it decodes, steps have few rows, and prefill of batch work is
    rare."""
    backend = FakeBackend(num_blocks=400)
    seen = []
    with make_engine(
        tokenizer, backend, max_num_seqs=12, max_model_len=400, max_num_batched_tokens=64, prefill_chunk=32
    ) as engine:
        held = [as_batch(ask(f"b{i}", tuple(range(40 + i)), max_tokens=150)) for i in range(8)]
        wait = start(engine, held)
        until(lambda: engine.stats().running == 8 and engine.stats().tokens > 8)
        backend.on_step = lambda batch: seen.append((batch.num_rows, len(batch.samples)))
        late = [as_batch(ask(f"c{i}", tuple(range(60, 100 + i)), max_tokens=20)) for i in range(3)]
        wait_late = start(engine, late)
        first = gather(engine, [ask("x", (7, 8, 9), max_tokens=300)])
        during = list(seen)
        outputs, others = wait(), wait_late()
    assert len(first["x", 0].token_ids) == 300
    decode_steps = [rows for rows, samples in during if rows == samples]
    assert sum(rows > 1 + spare_rows(1) for rows in decode_steps) <= 3, "the step that it came in, and the last"
    chunks = sum(rows > samples for rows, samples in during)
    assert chunks <= 4 + len(during) // EVERY
    assert any(rows == 1 + spare_rows(1) for rows in decode_steps), "batch work goes on"
    with make_engine(tokenizer, FakeBackend(400), max_model_len=400) as engine:
        alone = gather(engine, [*held, *late])
    for key, output in (outputs | others).items():
        assert output.token_ids == alone[key].token_ids


def test_it_gives_up_its_blocks_first(tokenizer):
    with make_engine(tokenizer, FakeBackend(num_blocks=16), max_model_len=96) as engine:
        batch = [as_batch(ask(f"b{i}", tuple(range(20)), max_tokens=40, temperature=1.0, seed=i)) for i in range(3)]
        wait = start(engine, batch)
        others = gather(engine, [ask(f"x{i}", (9, i), max_tokens=60) for i in range(2)])
        outputs = wait()
    assert all(len(output.token_ids) == 60 for output in others.values())
    assert all(len(output.token_ids) == 40 for output in outputs.values())


def test_a_group_of_many_rows_draws_in_its_turn_and_others_after_it(tokenizer):
    """Beside one row of other work batch work has one row a step; a request of four views draws in every fourth."""
    backend = FakeBackend(num_blocks=400)
    views = Ensemble(tuple(Member("a", 1 / 4, view) for view in range(4)))
    wide = as_batch(ask("wide", (1, 2, 3), views=[(1, 2), (3,), (4, 5)], ensemble=views, max_tokens=30))
    narrow = as_batch(ask("narrow", (4, 5, 6), max_tokens=60))
    backend.on_step = lambda _batch: time.sleep(0.005)  # they have not ended when the other one comes
    with make_engine(tokenizer, backend, max_num_seqs=12, max_model_len=800) as engine:
        wait = start(engine, [wide, narrow])
        until(lambda: engine.stats().tokens > 4)
        rows = []
        backend.on_step = lambda batch: rows.append(batch.num_rows)
        gather(engine, [ask("x", (7, 8, 9), max_tokens=600)])
        outputs = wait()
    assert len(outputs["narrow", 0].token_ids) == 60, "it has ended although other work always ran"
    assert len(outputs["wide", 0].token_ids) == 30
    assert rows.count(5) >= 15 and rows.count(1) >= 3 * 15


def test_it_gives_up_its_blocks_to_a_prompt_that_waits(tokenizer):
    """There are places, but no blocks."""
    backend = FakeBackend(num_blocks=40)
    backend.on_step = lambda _batch: time.sleep(0.002)
    batch = as_batch(ask("b", tuple(range(100)), max_tokens=190))
    with make_engine(tokenizer, backend, max_num_seqs=16, max_model_len=320) as engine:
        wait = start(engine, [batch])
        until(lambda: engine.stats().free_blocks < 9)
        found = gather(engine, [ask("x", tuple(range(70)), max_tokens=4)])
        assert engine.stats().running + engine.stats().waiting == 1, "the batch request has not ended"
        assert len(found["x", 0].token_ids) == 4
        output = wait()["b", 0]
    with make_engine(tokenizer, FakeBackend(40), max_model_len=320) as engine:
        assert output.token_ids == gather(engine, [batch])["b", 0].token_ids
