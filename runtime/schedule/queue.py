"""`WaitingQueue`: the order in which waiting groups start, fair between tenants.

Each tenant has a counter of the tokens that it was served, divided by its weight; the tenant with the least goes next (the
virtual token counter of Sheng et al. 2024, "Fairness in serving large language models"). A tenant that was idle begins at the
least counter of those that were not: nothing is saved up. An answer's token counts as two of a prompt, as it costs a step.
Within a tenant: what was preempted, then by priority, then by arrival. Groups of batch work come after all others.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence

from .sequence import Group

ANSWER_WEIGHT = 2  # what an answer's token counts, in tokens of a prompt
_MOST_IDLE = 4096  # tenants without a group whose counters are remembered


_RECENT = 64  # groups


class WaitingQueue:
    """Also knows how many groups of each tenant run: a tenant is active while it has any group."""

    def __init__(self) -> None:
        self._groups: dict[str, list[Group]] = {}  # tenant → its waiting groups, the next first
        self._arrival: dict[Group, int] = {}
        self._numbers = itertools.count()
        self._num_running: Counter[str] = Counter()
        self._recent: deque[str] = deque(maxlen=_RECENT)  # tenants of the groups that came last
        self._served: OrderedDict[str, float] = OrderedDict()  # tenant → tokens ÷ weight, a prompt's when it starts
        self._computed: dict[str, float] = {}  # the same, a prompt's as they are computed

    def __len__(self) -> int:
        return len(self._arrival)

    def __iter__(self) -> Iterator[Group]:
        """The waiting groups in the order in which they start. The caller may remove the group that it got, and charge."""
        rest = {tenant: iter(list(groups)) for tenant, groups in self._groups.items()}
        heads = {tenant: next(groups) for tenant, groups in rest.items()}
        while heads:
            tenant = min(heads, key=lambda name: self._order(heads[name]))
            group = heads.pop(tenant)
            following = next(rest[tenant], None)
            if following is not None:
                heads[tenant] = following
            yield group

    @property
    def num_tenants(self) -> int:
        """Tenants with a waiting group."""
        return len(self._groups)

    @property
    def is_shared(self) -> bool:
        """Whether the groups that came last are of more than one tenant: another one may come at any moment."""
        return len(set(self._recent)) > 1

    def prefill_order(self, group: Group) -> tuple[bool, float, float]:
        """A running group's key among those whose prompts are computed: batch work last, then the tenant whose tokens cost the
        least so far, then the one with the fewest groups."""
        owner = group.owner
        return (
            owner.is_background,
            self._computed.get(owner.tenant, 0.0),
            self._num_running[owner.tenant] / owner.weight,
        )

    def served(self, tenant: str) -> float:
        """The tenant's counter."""
        return self._served.get(tenant, 0.0)

    def add(self, group: Group) -> None:
        tenant = group.owner.tenant
        if not self._is_active(tenant):
            others = [other for other in self._active() if other != tenant]
            for counter in (self._served, self._computed):
                counter[tenant] = max(counter.get(tenant, 0.0), min((counter.get(o, 0.0) for o in others), default=0.0))
            self._served.move_to_end(tenant)
            self._forget_idle()
        self._recent.append(tenant)
        self._insert(group, next(self._numbers))

    def put_back(self, group: Group) -> None:
        """A running group waits again, before the tenant's others: it holds the oldest of what was drawn."""
        self._num_running[group.owner.tenant] -= 1
        self._insert(group, -next(self._numbers))

    def start(self, group: Group, tokens: int) -> None:
        """A waiting group runs from now on; `tokens` of its prompts are computed for it."""
        self.remove(group)
        self._num_running[group.owner.tenant] += 1
        self._charge(self._served, group, tokens)

    def end(self, group: Group) -> None:
        """A running group has ended."""
        self._num_running[group.owner.tenant] -= 1

    def remove(self, group: Group) -> None:
        """A waiting group waits no more."""
        del self._arrival[group]
        groups = self._groups[group.owner.tenant]
        groups.remove(group)
        if not groups:
            del self._groups[group.owner.tenant]

    def computed(self, group: Group, prompt_tokens: int, answer_tokens: int) -> None:
        """A step has computed so much for a group."""
        self._charge(self._served, group, ANSWER_WEIGHT * answer_tokens)
        self._charge(self._computed, group, prompt_tokens + ANSWER_WEIGHT * answer_tokens)

    def _charge(self, counter: dict[str, float], group: Group, tokens: float) -> None:
        counter[group.owner.tenant] = counter.get(group.owner.tenant, 0.0) + tokens / group.owner.weight

    def _insert(self, group: Group, arrival: int) -> None:
        self._arrival[group] = arrival
        groups = self._groups.setdefault(group.owner.tenant, [])
        groups.append(group)
        groups.sort(key=self._within_tenant)

    def _within_tenant(self, group: Group) -> tuple[bool, bool, int, int]:
        arrival = self._arrival[group]
        return group.owner.is_background, arrival >= 0, group.priority if arrival >= 0 else 0, arrival

    def _order(self, group: Group) -> tuple[bool, float, int]:
        return group.owner.is_background, self.served(group.owner.tenant), self._arrival[group]

    def _is_active(self, tenant: str) -> bool:
        return tenant in self._groups or self._num_running[tenant] > 0

    def _active(self) -> set[str]:
        return {*self._groups, *(tenant for tenant, count in self._num_running.items() if count > 0)}

    def _forget_idle(self) -> None:
        while len(self._served) > _MOST_IDLE:
            idle = next((tenant for tenant in self._served if not self._is_active(tenant)), None)
            if idle is None:
                return
            del self._served[idle]
            self._computed.pop(idle, None)
            del self._num_running[idle]


def groups_over_share(group: Group, running: Sequence[Group], places: int) -> list[Group] | None:
    """Running groups that must give up their places so that a waiting one can start, the latest first.

    Batch work gives way to all other work, and nothing gives way to batch work. A tenant's share of the `places` for sequences
    is its weight's. Groups give way only to a tenant that stays within its share, and only while their own tenant keeps
    its share. None if that is not enough.
    """
    owner, chosen = group.owner, list[Group]()
    if owner.is_background:
        return None
    missing = sum(len(other.sequences) for other in (*running, group)) - places
    for other in reversed(running):
        if missing > 0 and other.owner.is_background:
            chosen.append(other)
            missing -= len(other.sequences)
    if missing <= 0:
        return chosen
    others = [other for other in running if not other.owner.is_background]
    held = Counter[str]()
    for other in (*others, group):
        held[other.owner.tenant] += len(other.sequences)
    weights = {other.owner.tenant: other.owner.weight for other in (*others, group)}
    share = {tenant: places * weight / sum(weights.values()) for tenant, weight in weights.items()}
    if held[owner.tenant] > max(share[owner.tenant], 1):
        return None
    for other in reversed(others):
        tenant, size = other.owner.tenant, len(other.sequences)
        if missing > 0 and tenant != owner.tenant and held[tenant] - size >= share[tenant]:
            chosen.append(other)
            held[tenant] -= size
            missing -= size
    return chosen if missing <= 0 else None
