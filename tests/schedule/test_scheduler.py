"""The scheduler alone: which rows a step has, and who gives way when blocks run out."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.scheduling import CHUNK, MAX_ROWS, answer, chunks_of, go_on, make_group, make_scheduler, run
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.runtime.api.request import FinishReason
from motet.runtime.schedule.sequence import SequenceStatus, TokenBuffer


def test_nothing_to_do():
    assert make_scheduler().schedule() is None


def test_a_prompt_is_cut_at_multiples_of_the_chunk_and_its_last_token_decodes():
    scheduler = make_scheduler()
    scheduler.add(make_group("a", 20))
    assert [chunks_of(run(scheduler)) for _ in range(5)] == [[(0, 8)], [(8, 8)], [(16, 3)], [(19, 1)], [(20, 1)]]


def test_the_step_that_ends_a_prompt_draws_if_the_backend_can():
    scheduler = make_scheduler(sample_prefill=True)
    scheduler.add(make_group("a", 20))
    assert [chunks_of(run(scheduler)) for _ in range(4)] == [[(0, 8)], [(8, 8)], [(16, 4)], [(20, 1)]]
    scheduler.add(group := make_group("b", 3, 13))
    batch = run(scheduler)
    assert chunks_of(batch) == [(21, 1), (0, 2), (0, 8)]
    batch = run(scheduler)  # the shorter view has waited for the longer one
    assert chunks_of(batch) == [(22, 1), (2, 1), (8, 5)]
    assert [sample.terms for sample in batch.samples] == [((0, 0, 1.0),), ((1, 0, 0.5), (6, 0, 0.5))]
    assert group.output.array().tolist() == [103]
    assert [sequence.num_computed for sequence in group.sequences] == [3, 13]
    assert chunks_of(run(scheduler)) == [(23, 1), (3, 1), (13, 1)]


def test_a_prompt_whose_last_token_finds_no_room_is_drawn_a_step_later():
    scheduler = make_scheduler(max_rows=8, sample_prefill=True)
    scheduler.add(make_group("a", 9))
    assert [chunks_of(run(scheduler)) for _ in range(2)] == [[(0, 8)], [(8, 1)]]
    scheduler = make_scheduler(num_blocks=4, sample_prefill=True)
    scheduler.add(make_group("b", 15))
    assert [chunks_of(run(scheduler)) for _ in range(3)] == [[(0, 8)], [(8, 7)], [(15, 1)]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 4))
def test_chunks_do_not_depend_on_the_batch(lengths, start):
    """The same cuts for a prompt alone and in company that arrives before and after it."""
    alone = make_scheduler()
    alone.add(make_group("a", 29))
    expected = [chunks_of(run(alone))[0] for _ in range(5)]
    scheduler, group, found = make_scheduler(num_blocks=200), make_group("a", 29), []

    def step():
        computed = group.sequences[0].num_computed
        run(scheduler)
        if group.sequences[0].num_computed > computed:
            found.append((computed, group.sequences[0].num_computed - computed))

    for index, length in enumerate(lengths):
        if index == min(start, len(lengths) - 1):
            scheduler.add(group)
        scheduler.add(make_group(f"b{index}", length))
        step()
    while len(found) < len(expected):
        step()
    assert found[: len(expected)] == expected


def test_decode_rows_come_first_and_chunks_fill_the_rest():
    scheduler = make_scheduler()
    scheduler.add(make_group("a", 1))
    run(scheduler)
    scheduler.add(make_group("b", 30))
    scheduler.add(make_group("c", 30))
    batch = run(scheduler)
    assert chunks_of(batch) == [(1, 1), (0, 8)]  # c's whole chunk does not fit beside: 17 rows
    assert [sample.position for sample in batch.samples] == [2]


def test_a_chunk_runs_even_if_decoding_leaves_no_room():
    scheduler = make_scheduler(max_rows=8, chunk=8)
    scheduler.add(make_group("a", 1))
    run(scheduler)
    scheduler.add(make_group("b", 30))
    assert chunks_of(run(scheduler)) == [(1, 1), (0, 8)]


def test_a_chunk_is_no_longer_than_a_step():
    scheduler = make_scheduler(max_rows=6, chunk=256)
    scheduler.add(make_group("a", 20))
    assert [chunks_of(run(scheduler)) for _ in range(4)] == [[(0, 6)], [(6, 6)], [(12, 6)], [(18, 1)]]


def test_views_of_different_lengths_are_sampled_in_one_step():
    scheduler = make_scheduler()
    group = make_group("a", 3, 30)
    scheduler.add(group)
    batches = [run(scheduler) for _ in range(6)]
    sampled = [batch for batch in batches if batch.samples]
    assert [chunks_of(batch) for batch in sampled] == [[(2, 1), (29, 1)], [(3, 1), (30, 1)]]
    assert sampled[0].samples[0].terms == ((0, 0, 0.5), (1, 0, 0.5))
    assert all(batch is not sampled[0] for batch in batches[:4])
    assert [sequence.tokens.array()[-2:].tolist() for sequence in group.sequences] == [[103, 104]] * 2


def test_slots_follow_the_block_table():
    scheduler = make_scheduler(block_size=4)
    scheduler.add(make_group("a", 3))
    scheduler.add(make_group("b", 11))
    batch = run(scheduler)
    assert chunks_of(batch) == [(0, 2), (0, 8)]
    for index, (first, count) in enumerate(chunks_of(batch)):
        rows = slice(batch.cu_seqlens_q[index], batch.cu_seqlens_q[index + 1])
        positions = np.arange(first, first + count)
        assert batch.positions[rows].tolist() == positions.tolist()
        table = batch.block_tables[index]
        assert batch.slot_mapping[rows].tolist() == (table[positions // 4] * 4 + positions % 4).tolist()
    assert (batch.block_tables >= 0).sum(axis=1).tolist() == [1, 3]


def test_a_small_group_passes_a_large_one_that_waits():
    """The second group does not fit; the third does and starts, the fourth, as large as the second, stays behind it."""
    scheduler = make_scheduler(max_num_seqs=3)
    groups = [make_group("a", 2, 2), make_group("b", 2, 2), make_group("c", 2), make_group("d", 2, 2)]
    for group in groups:
        scheduler.add(group)
    run(scheduler)
    waiting, running = SequenceStatus.WAITING, SequenceStatus.RUNNING
    assert [group.status for group in groups] == [running, waiting, running, waiting]
    scheduler.abort(groups[0])
    run(scheduler)
    assert [group.status for group in groups[1:]] == [running, running, waiting]


def test_a_large_group_is_passed_a_limited_number_of_times():
    """Small groups come without end and one of two places is always taken, yet the group of two starts."""
    scheduler = make_scheduler(max_num_seqs=2)
    small = make_group("0", 2)
    large = make_group("large", 2, 2)
    scheduler.add(small)
    scheduler.add(large)
    for number in range(1, 50):
        following = make_group(str(number), 2)
        scheduler.add(following)
        run(scheduler)
        if large.status is SequenceStatus.RUNNING:
            break
        scheduler.abort(small)
        small = following
    assert large.num_passed == 8  # 4 × max_num_seqs
    assert number in (8, 9, 10)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_latest_group_gives_way_and_is_recomputed(prefix_cache):
    """With a prefix cache, but for the blocks that nobody took in the meantime."""
    scheduler = make_scheduler(num_blocks=4, block_size=4, prefix_cache=prefix_cache)
    first, second = make_group("a", 7), make_group("b", 7)
    scheduler.add(first)
    scheduler.add(second)
    run(scheduler, 3)  # prefill, then two tokens: 9 positions need a third block
    kept = second.output.array().tolist()
    assert len(kept) == 2
    held = list(second.sequences[0].block_table)
    batch = run(scheduler)
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert sorted(batch.freed_blocks.tolist()) == held[prefix_cache:]
    assert chunks_of(batch) == [(8, 1)]
    scheduler.abort(first)
    cached = 4 * prefix_cache
    assert chunks_of(run(scheduler)) == [(cached, 8 - cached)]  # its prompt and its answer, but for the last token
    assert second.output.array().tolist() == kept
    assert run(scheduler).samples[0].position == 9


def test_a_group_that_is_the_latest_gives_way_itself():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    first, second = make_group("a", 8), make_group("b", 4)
    scheduler.add(first)
    scheduler.add(second)
    run(scheduler, 2)  # 9 and 5 positions: one block each, and one is free
    assert chunks_of(run(scheduler)) == [(8, 1)]
    assert (first.status, second.status) == (SequenceStatus.RUNNING, SequenceStatus.WAITING)
    assert (second.sequences[0].num_computed, second.sequences[0].block_table) == (0, [])


def test_a_preempted_group_comes_back_before_those_that_wait():
    scheduler = make_scheduler(max_num_seqs=2)
    groups = [make_group(name, 2) for name in "abc"]
    for group in groups:
        scheduler.add(group)
    run(scheduler)
    scheduler.preempt(groups[1])
    assert list(scheduler.waiting) == groups[1:]
    run(scheduler)
    assert scheduler.running == groups[:2]


@pytest.mark.parametrize("steps", range(5))
def test_abort_frees_everything_at_any_time(steps):
    scheduler = make_scheduler(num_blocks=8, block_size=4)
    groups = [make_group("a", 12), make_group("b", 9, 3), make_group("c", 2)]
    for group in groups:
        scheduler.add(group)
    if steps:
        run(scheduler, steps)
    for group in groups:
        scheduler.abort(group)
        scheduler.check_integrity()
        assert group.status is SequenceStatus.FINISHED
    assert scheduler.blocks.num_free == 8
    assert scheduler.schedule() is None


def test_a_sample_with_an_error_gets_no_token():
    scheduler = make_scheduler()
    groups = [make_group("a", 1), make_group("b", 1)]
    for group in groups:
        scheduler.add(group)
    scheduled = scheduler.schedule()
    drawn = scheduler.commit(scheduled, answer(scheduled.batch, {0: "NaN"}), go_on)
    assert [(run.group, run.first, run.count, run.reason, run.error) for run in drawn] == [
        (groups[0], 0, 0, None, "NaN"),
        (groups[1], 1, 1, None, None),
    ]
    assert [len(group.output) for group in groups] == [0, 1]


def test_a_failed_step_names_its_groups_and_recomputes_the_others():
    scheduler = make_scheduler(max_rows=8, chunk=8)
    groups = [make_group(name, 20) for name in "abc"]
    for group in groups:
        scheduler.add(group)
    run(scheduler, 3)  # a has its prompt
    scheduled = scheduler.schedule()  # a decodes, b has a chunk; c waits for room
    assert scheduler.fail(scheduled) == groups[:2]
    assert groups[2].status is SequenceStatus.WAITING
    for group in groups[:2]:
        scheduler.abort(group)
    scheduler.check_integrity()
    assert chunks_of(run(scheduler)) == [(0, 8)]


def test_end_of_sequence_is_forbidden_until_min_tokens():
    scheduler = make_scheduler()
    scheduler.add(make_group("a", 1, stop_ids=(9, 5), min_tokens=2))
    for ids in ([5, 9], [5, 9], []):
        edits = run(scheduler).samples[0].edits
        assert edits.ids.tolist() == ids
        assert (edits.biases == -np.inf).all()


def test_a_sample_is_edited_by_prompt_and_answer():
    scheduler = make_scheduler()
    scheduler.add(make_group("a", 3, repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5))
    run(scheduler, 2)
    scheduled = scheduler.schedule()
    sample = scheduled.batch.samples[0]
    assert (sample.position, sample.sampling.seed) == (4, 7)
    scheduler.commit(scheduled, answer(scheduled.batch), go_on)
    assert sample.edits.ids.tolist() == [1, 2, 3, 103]  # as it was then, though the group has gone on
    assert sample.edits.divisors.tolist() == [1.5] * 4
    assert sample.edits.penalties.tolist() == [0.0, 0.0, 0.0, 0.75]


def test_token_buffer_grows_without_copying_each_time():
    buffer = TokenBuffer((1, 2))
    copies, last = 0, buffer.array().base
    for token_id in range(1000):
        buffer.append(token_id)
        copies += buffer.array().base is not last
        last = buffer.array().base
    assert buffer.array().tolist() == [1, 2, *range(1000)]
    assert len(TokenBuffer()) == 0
    assert copies <= 10


def second_token(group, token_id):
    return FinishReason.LENGTH if len(group.output) == 2 else None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=2), min_size=1, max_size=6),
    st.integers(8, 16),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=4),
)
def test_every_group_ends_and_no_block_is_lost(lengths, num_blocks, aborts):
    """Eight blocks hold the largest group (two views of 14 and two tokens); whatever the order, all come to an end."""
    scheduler = make_scheduler(num_blocks, block_size=4)
    groups = [make_group(f"g{index}", *views) for index, views in enumerate(lengths)]
    for group in groups:
        scheduler.add(group)
    for step in range(500):
        for at, index in aborts:
            if at == step and index < len(groups) and groups[index].status is not SequenceStatus.FINISHED:
                scheduler.abort(groups[index])
        scheduled = scheduler.schedule()
        if scheduled is None:
            break
        assert scheduled.batch.num_rows <= MAX_ROWS + CHUNK
        for drawn in scheduler.commit(scheduled, answer(scheduled.batch), second_token):
            if drawn.reason is not None:
                assert len(drawn.group.output) == 2
                scheduler.abort(drawn.group)
        scheduler.check_integrity()
    assert all(group.status is SequenceStatus.FINISHED for group in groups)
    assert scheduler.blocks.num_free == num_blocks
