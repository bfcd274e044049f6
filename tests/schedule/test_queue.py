"""Who starts next, and who gives way: tenants, weights, priorities, batch work."""

from __future__ import annotations

import pytest
from motet.runtime.api.request import Owner, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.schedule.blocks import BlockManager
from motet.runtime.schedule.queue import WaitingQueue, groups_over_share
from motet.runtime.schedule.resolve import LogitEditor
from motet.runtime.schedule.scheduler import Scheduler
from motet.runtime.schedule.sequence import Group, Sequence, SequenceStatus


def group(tenant="", *, weight=1.0, background=False, priority=0, prompt=(1, 2, 3), sequences=1, max_tokens=4):
    params = SamplingParams(temperature=0.0)
    return Group(
        request_id=tenant,
        choice=0,
        sequences=[Sequence(prompt, (0,), root=tenant.encode()) for _ in range(sequences)],
        terms=tuple((index, 0, 1 / sequences) for index in range(sequences)),
        space=Space.LOGITS,
        params=params,
        seed=0,
        max_tokens=max_tokens,
        stop_ids=frozenset(),
        editor=LogitEditor(params, frozenset(), prompt),
        priority=priority,
        owner=Owner(tenant, weight, background),
    )


def tenants(groups):
    return "".join(g.owner.tenant for g in groups)


def test_one_tenant_is_first_come_first_served():
    queue, groups = WaitingQueue(), [group() for _ in range(4)]
    for each in groups:
        queue.add(each)
    assert list(queue) == groups
    queue.start(groups[0], 3)
    queue.start(groups[1], 3)
    queue.put_back(groups[1])
    queue.put_back(groups[0])
    assert list(queue) == groups  # what was preempted last began first
    queue.remove(groups[2])
    assert list(queue) == [groups[0], groups[1], groups[3]]


def test_priorities_are_within_a_tenant():
    queue = WaitingQueue()
    low, high, other = group("a", priority=5), group("a", priority=-5), group("b")
    for each in (low, other, high):
        queue.add(each)
    assert list(queue) == [other, high, low]  # b came first; of a's, the lower number goes first


@pytest.mark.parametrize(("weight", "wanted"), [(1.0, "ababab"), (2.0, "abaaba")])
def test_tenants_take_turns_by_weight(weight, wanted):
    """Six places are given one after another, each for a prompt of 100 tokens."""
    queue = WaitingQueue()
    for _ in range(8):
        queue.add(group("a", weight=weight))
    for _ in range(8):
        queue.add(group("b"))
    started = []
    for _ in range(6):
        chosen = next(iter(queue))
        queue.start(chosen, 100)
        started.append(chosen)
    assert tenants(started) == wanted


def test_nothing_is_saved_up_by_waiting():
    queue = WaitingQueue()
    first = group("a")
    queue.add(first)
    queue.start(first, 10_000)
    queue.add(group("b"))
    assert queue.served("b") == queue.served("a") == 10_000


def test_long_prompts_do_not_starve_others():
    """A tenant with few but long prompts, one after another, does not keep those of another from being computed."""
    scheduler = Scheduler(BlockManager(512, 4), 16, 64, 16)
    many = [group("a", prompt=tuple(range(100))) for _ in range(8)]
    for each in many:
        scheduler.add(each)
    for _step in range(100):
        while sum(g.owner.tenant == "b" for g in scheduler.running) < 3:
            scheduler.add(group("b", prompt=tuple(range(200))))
            scheduler._admit()
        for prefill in scheduler.schedule().prefills:
            scheduler._sharing.advance(prefill.sequence, prefill.count)
            scheduler.waiting.computed(prefill.group, prefill.count, 0)
        for done in [g for g in scheduler.running if not any(s.num_prefill for s in g.sequences)]:
            scheduler.abort(done)
    assert not any(each in scheduler.running for each in many)


def test_batch_work_comes_last():
    queue = WaitingQueue()
    for each in (group("a", background=True), group("b", background=True), group("a")):
        queue.add(each)
    assert [g.owner.is_background for g in queue] == [False, True, True]


def test_who_gives_way():
    flood = [group("a") for _ in range(4)]
    assert groups_over_share(group("a"), flood, 4) is None  # nobody to its own tenant
    assert groups_over_share(group("b"), flood, 4) == [flood[3]]
    even = [*flood[:2], group("b"), group("b")]
    assert groups_over_share(group("b"), even, 4) is None  # b would have more than its share
    assert groups_over_share(group("a"), even, 4) is None
    assert groups_over_share(group("b", sequences=2), flood, 4) == [flood[3], flood[2]]
    assert groups_over_share(group("b", sequences=3), flood, 4) is None
    assert groups_over_share(group("b", weight=3.0, sequences=3), flood, 4) == flood[:0:-1]
    job = [group("a", background=True) for _ in range(4)]
    assert groups_over_share(group("a"), job, 4) == [job[3]]
    assert groups_over_share(group("c", background=True), job, 4) is None  # batch work takes no place away
    assert groups_over_share(group("c", background=True), flood, 4) is None
    both = [*flood[:2], group("b", background=True), group("b", background=True)]
    assert groups_over_share(group("a"), both, 4) == [both[3]]  # also from a tenant within its share
    assert groups_over_share(group("b"), both, 4) == [both[3]]
    assert groups_over_share(group("a", sequences=3), both, 4) is None  # its own others stay


def test_prompts_have_a_part_of_a_step_where_tenants_share_it():
    """A step of one tenant's prompts is as long as the rows that another's request would wait for."""
    for tenants, expected in (("a", 64), ("ab", 16)):
        scheduler = Scheduler(BlockManager(256, 4), 16, 64, 32)
        for tenant in tenants:  # they were here, and are idle
            before = group(tenant)
            scheduler.add(before)
            scheduler.schedule()
            scheduler.abort(before)
        flood = [group("a", prompt=tuple(range(100 * index, 100 * index + 9))) for index in range(1, 11)]
        for each in flood:
            scheduler.add(each)
        assert sum(prefill.count for prefill in scheduler.schedule().prefills) == expected
        alone = group("b", prompt=tuple(range(5000, 5100)))
        for each in flood:
            scheduler.abort(each)
        scheduler.add(alone)
        assert [prefill.count for prefill in scheduler.schedule().prefills] == [32]  # a chunk is not cut


def test_a_flood_keeps_no_one_waiting():
    """A tenant holds all places and a long queue; another's request runs in the next step, and its prompt goes first."""
    scheduler = Scheduler(BlockManager(64, 4), 4, 64, 16)
    flood = [group("a", prompt=tuple(range(1, 40)), max_tokens=50) for _ in range(12)]
    for each in flood:
        scheduler.add(each)
    scheduler.schedule()
    assert len(scheduler.running) == 4
    late = group("b", prompt=tuple(range(1, 12)))
    scheduler.add(late)
    scheduled = scheduler.schedule()
    assert late.status is SequenceStatus.RUNNING
    assert flood[3].status is SequenceStatus.WAITING
    assert scheduled.prefills[0].sequence is late.sequences[0]
    scheduler.abort(late)
    scheduler.schedule()
    assert flood[3].status is SequenceStatus.RUNNING  # it goes on before the tenant's others
    for each in flood:
        scheduler.abort(each)
    scheduler.check_integrity()
    assert not scheduler.waiting and not scheduler.running


def test_a_queue_is_shared_as_long_as_others_came_lately():
    queue = WaitingQueue()
    queue.add(group("a"))
    assert not queue.is_shared
    queue.add(group("b"))
    assert queue.is_shared
    for _ in range(63):
        queue.add(group("a"))
    assert queue.is_shared
    queue.add(group("a"))
    assert not queue.is_shared
