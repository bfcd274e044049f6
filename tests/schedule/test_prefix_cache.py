"""Which blocks the scheduler takes from the prefix cache, and what is never shared."""

from __future__ import annotations

from helpers.scheduling import answer, chunks_of, go_on, make_group, make_scheduler, run
from motet.runtime.schedule.sequence import Sequence


def test_choices_compute_their_prompt_once():
    """Blocks of 4, prompts of 11: the second group waits while the first one fills two blocks, then computes the rest."""
    scheduler = make_scheduler(block_size=4)
    groups = [make_group("a", 11) for _ in range(3)]
    for group in groups:
        scheduler.add(group)
    assert chunks_of(run(scheduler)) == [(0, 8)]
    assert chunks_of(run(scheduler)) == [(8, 2)] * 3
    assert chunks_of(run(scheduler)) == [(10, 1)] * 3
    tables = [group.sequences[0].block_table for group in groups]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    assert [group.sequences[0].num_cached for group in groups] == [0, 8, 8]


def test_a_running_sequence_takes_what_others_have_computed():
    scheduler = make_scheduler(block_size=4, max_rows=8)
    groups = [make_group("a", 20), make_group("a", 22)]
    for group in groups:
        scheduler.add(group)
    assert [chunks_of(run(scheduler)) for _ in range(3)] == [[(0, 8)], [(8, 8)], [(16, 3), (16, 5)]]
    assert groups[1].sequences[0].num_cached == 16
    assert groups[1].sequences[0].block_table[:4] == groups[0].sequences[0].block_table[:4]


def test_the_block_of_the_last_token_is_not_shared():
    """A prompt of two whole blocks: the second must be computed again, because its last row is."""
    scheduler = make_scheduler(block_size=4)
    for count in range(2):
        scheduler.add(group := make_group("a", 8))
        run(scheduler, 3)
        assert group.sequences[0].num_cached == 4 * count
        scheduler.abort(group)
    scheduler.check_integrity()


def test_an_answer_is_shared_too():
    """The next turn of a chat begins with the last prompt and its answer."""
    scheduler = make_scheduler(block_size=4)
    scheduler.add(first := make_group("a", 3))
    run(scheduler, 8)
    scheduler.abort(first)
    tokens = tuple(first.sequences[0].tokens.array().tolist())
    assert len(tokens) == 10
    second = make_group("b", 1)
    second.sequences[0] = Sequence((*tokens, 5, 6), (0,))
    scheduler.add(second)
    assert chunks_of(run(scheduler)) == [(8, 3)]


def test_only_what_holds_all_members_is_shared():
    scheduler = make_scheduler(block_size=4)
    cached = []
    for members in ((0, 1), (0, 1, 2), (1,), (2,), (3,)):
        scheduler.add(group := make_group("a", 9, members=members))
        run(scheduler, 3)
        cached.append(group.sequences[0].num_cached)
        scheduler.abort(group)
    assert cached == [0, 0, 8, 8, 0]
    scheduler.check_integrity()


def test_a_adapter_shares_with_itself_only():
    scheduler = make_scheduler(block_size=4)
    cached = []
    for adapter in (-1, 1, 2, 1, -1):
        group = make_group("a", 1)
        group.sequences[0] = Sequence(tuple(range(9)), (0,), adapter)
        scheduler.add(group)
        run(scheduler, 3)
        cached.append(group.sequences[0].num_cached)
        scheduler.abort(group)
    assert cached == [0, 0, 0, 8, 8]


def test_what_has_equal_roots_is_shared():
    """Equal prompts of two tenants share nothing, neither from the cache nor within a step."""
    scheduler = make_scheduler(block_size=4)
    cached = []
    for root, adapter in ((b"", -1), (b"x", -1), (b"y", -1), (b"x", 1), (b"x", -1), (b"", -1), (b"y", -1)):
        group = make_group("a", 1)
        group.sequences[0] = Sequence(tuple(range(9)), (0,), adapter, root=root)
        scheduler.add(group)
        run(scheduler, 3)
        cached.append(group.sequences[0].num_cached)
        scheduler.abort(group)
    assert cached == [0, 0, 0, 0, 8, 8, 8]
    for root in (b"new", b"other", b"new"):
        group = make_group("a", 1)
        group.sequences[0] = Sequence(tuple(range(9)), (0,), root=root)
        scheduler.add(group)
    assert chunks_of(run(scheduler)) == [(0, 8), (0, 8)]  # the third waits for the first


def test_without_prefix_cache_nothing_is_shared():
    scheduler = make_scheduler(prefix_cache=False)
    for _ in range(2):
        scheduler.add(make_group("a", 9))
    assert chunks_of(run(scheduler)) == [(0, 8)] * 2


def test_idle_blocks_are_taken_when_they_are_needed():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(first := make_group("a", 9))
    run(scheduler, 3)
    scheduler.abort(first)
    assert scheduler.blocks.num_free == 4
    scheduler.add(second := make_group("b", 16))
    assert chunks_of(run(scheduler)) == [(0, 8)]
    assert scheduler.blocks.num_free == 0
    scheduler.abort(second)
    scheduler.add(again := make_group("a", 9))
    run(scheduler)
    assert again.sequences[0].num_cached == 0


def test_what_a_failed_step_left_is_not_shared():
    scheduler = make_scheduler(block_size=4)
    scheduler.add(make_group("a", 9))
    run(scheduler, 2)
    for group in scheduler.fail(scheduler.schedule()):
        scheduler.abort(group)
    scheduler.add(group := make_group("a", 9))
    assert chunks_of(run(scheduler)) == [(0, 8)]


def test_what_has_nan_is_not_shared():
    scheduler = make_scheduler(block_size=4)
    scheduler.add(group := make_group("a", 9))
    run(scheduler)
    scheduled = scheduler.schedule()
    scheduler.commit(scheduled, answer(scheduled.batch, {0: "NaN"}), go_on)
    scheduler.abort(group)
    scheduler.check_integrity()
    scheduler.add(make_group("a", 9))
    assert chunks_of(run(scheduler)) == [(0, 8)]
