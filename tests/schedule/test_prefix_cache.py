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


def test_a_kept_trunk_serves_members_that_did_not_run_over_it():
    """Blocks of 4, prompts of 13: the second member's tail runs over three blocks whose trunk is cached; the third request
    lacks one of its two members; the last one lacks nothing."""
    scheduler = make_scheduler(block_size=4, max_rows=8, keeps_trunk=True)
    seen = []
    for members in ((0,), (1,), (1, 2), (0, 2)):
        scheduler.add(group := make_group("a", 13, members=members))
        steps = []
        while group.sequences[0].num_prefill or not steps:
            batch = run(scheduler)
            steps.append((chunks_of(batch)[0], batch.members[0], bool(batch.trunk_cached[0])))
        seen.append((steps, group.sequences[0].num_cached))
        scheduler.abort(group)
    assert seen == [
        ([((0, 8), (0,), False), ((8, 4), (0,), False)], 0),
        ([((0, 8), (1,), True), ((8, 4), (1,), True)], 0),
        ([((0, 8), (2,), True), ((8, 4), (2,), True)], 0),
        ([((12, 1), (0, 2), False)], 12),
    ]
    scheduler.check_integrity()


def test_two_members_over_one_prefix_follow_each_other():
    """Requests that arrive together: the trunk is computed once; a block is written by one of them at a time."""
    scheduler = make_scheduler(block_size=4, max_rows=8, keeps_trunk=True)
    groups = [make_group("a", 18, members=(member,)) for member in (0, 1)]
    for group in groups:
        scheduler.add(group)
    steps = []
    while any(group.sequences[0].num_prefill for group in groups):
        batch = run(scheduler)
        steps += zip(chunks_of(batch), batch.members, batch.trunk_cached.tolist(), strict=True)
    assert sum(count for (first, count), _, cached in steps if not cached and first < 17) == 17 + 1
    assert [(chunk, who) for chunk, who, cached in steps if cached] == [((0, 8), (1,)), ((8, 8), (1,))]
    scheduler.check_integrity()


def test_blocks_that_lack_different_members_are_computed_apart():
    scheduler = make_scheduler(block_size=4, max_rows=16, chunk=16, keeps_trunk=True)
    for length, members in ((13, (0,)), (9, (1,)), (13, (0, 1, 2))):
        scheduler.add(group := make_group("a", length, members=members))
        batches = [run(scheduler) for _ in range(2)]
        scheduler.abort(group)
    assert [(chunks_of(batch)[0], batch.members[0]) for batch in batches] == [((0, 8), (2,)), ((8, 4), (1, 2))]


def test_what_has_equal_roots_is_shared():
    """Equal prompts of two tenants share nothing, neither from the cache nor within a step."""
    scheduler = make_scheduler(block_size=4)
    cached = []
    for root in (b"", b"x", b"y", b"x", b"", b"y"):
        group = make_group("a", 1)
        group.sequences[0] = Sequence(tuple(range(9)), (0,), root=root)
        scheduler.add(group)
        run(scheduler, 3)
        cached.append(group.sequences[0].num_cached)
        scheduler.abort(group)
    assert cached == [0, 0, 0, 8, 8, 8]
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
