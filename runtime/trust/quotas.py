"""`Quotas`: how much each tenant may do. Rates are token buckets (RFC 2697's idea): a full bucket is one minute's amount."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..api.config import check_keys
from ..errors import ConfigError, OverloadedError
from .keys import check_tenant

_MOST_TENANTS = 4096  # whose buckets are kept; those of others were full again long ago
DEFAULT = "default"  # limits of tenants without a table of their own


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may do. None: no limit of its own. Raises `ConfigError`, naming the key."""

    weight: float = 1.0  # of its turn in the queue: twice the weight gets twice the tokens while others wait
    max_requests: int | None = None  # open at once
    max_waiting: int | None = (
        None  # choices that may queue; None: half of the server's queue, so that it has room for others
    )
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 < self.weight <= 1000:
            raise ConfigError(f"weight must be a number in (0, 1000], got {self.weight!r}")
        for one in dataclasses.fields(self)[1:]:
            value = getattr(self, one.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{one.name} must be an integer of at least 1, got {value!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TenantLimits:
        """Raises `ConfigError` for unknown keys and values out of range."""
        check_keys(cls, dict(values))
        return cls(**values)


class Bucket:
    """Holds up to `per_minute` units and fills by as many a minute. It may go below zero: what an answer costs is known only
    when it is there, and the next request waits for it."""

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._size, self._clock = per_minute, clock
        self._level, self._at = per_minute, clock()

    def take(self, units: float) -> None:
        self._fill()
        self._level -= units

    def wait_s(self, units: float) -> float:
        """Seconds until so many units, or a full bucket if that is less, are there."""
        self._fill()
        return max(0.0, min(units, self._size) - self._level) * 60 / self._size

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._at) * self._size / 60)
        self._at = now


@dataclass(slots=True)
class _Account:
    requests: Bucket | None
    tokens: Bucket | None
    num_requests: int = 0  # open
    num_background: int = 0  # open, of batch work
    num_places: int = 0

    @property
    def is_idle(self) -> bool:
        return not self.num_requests and not self.num_background and not self.num_places


def read_limits(tables: Mapping[str, Any]) -> dict[str, TenantLimits]:
    """Tenant → limits, from tenant → keys of `TenantLimits`. Raises `ConfigError`."""
    found = {}
    for tenant, values in tables.items():
        if not isinstance(values, dict):
            raise ConfigError(f"the limits of tenant '{tenant}' must be a table")
        try:
            found[check_tenant(tenant)] = TenantLimits.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"the limits of tenant '{tenant}': {error}") from None
    return found


class Quotas:
    """What each tenant has used of its limits, and the server of its places. Not thread-safe: it belongs to the event loop.

    `limits`: by tenant; `default` is of the tenants that are not named. `num_places`: requests that the server reads,
    computes and sends at once. A tenant has at most half of them, so that there is one for others.
    """

    def __init__(
        self, limits: Mapping[str, TenantLimits], num_places: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits, self._num_places, self._clock = limits, num_places, clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()  # the one used last is last
        self.num_open = 0  # places that are taken

    def of(self, tenant: str) -> TenantLimits:
        """A tenant's limits."""
        return self._limits.get(tenant) or self._limits.get(DEFAULT) or TenantLimits()

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Take a place while something is read or answered. Raises `OverloadedError`."""
        account, limit = self._account(tenant), self._num_places
        if self.num_open >= limit or (tenant and account.num_places >= max(limit // 2, 1)):
            raise OverloadedError(f"{limit} requests (max_requests) are open on this server; try again later")
        self.num_open += 1
        account.num_places += 1
        try:
            yield
        finally:
            self.num_open -= 1
            account.num_places -= 1

    @contextmanager
    def open(self, tenant: str, *, is_background: bool = False) -> Iterator[None]:
        """Count a request of the tenant, and take a place, while it is open. Batch work is counted apart, and may have half as
        many requests. Raises `OverloadedError`."""
        account, limits = self._account(tenant), self.of(tenant)
        held, most = account.num_requests, limits.max_requests
        if is_background:
            held, most = account.num_background, None if most is None else max(1, most // 2)
        if most is not None and held >= most:
            raise OverloadedError(
                f"tenant '{tenant}' has {held} requests open, its limit (max_requests); wait for one to end"
            )
        if account.requests is not None and (wait := account.requests.wait_s(1)) > 0:
            raise OverloadedError(
                f"tenant '{tenant}' has spent its {limits.requests_per_minute} requests per minute; go on in {wait:.1f} s",
                retry_after_s=wait,
            )
        if account.requests is not None:
            account.requests.take(1)
        account.num_background += is_background
        account.num_requests += not is_background
        try:
            with self.place(tenant):
                yield
        finally:
            account.num_background -= is_background
            account.num_requests -= not is_background

    def check_tokens(self, tenant: str, tokens: int) -> None:
        """Whether the tenant may begin a request with so many tokens in its prompts. Raises `OverloadedError`."""
        bucket = self._account(tenant).tokens
        if bucket is not None and (wait := bucket.wait_s(tokens)) > 0:
            raise OverloadedError(
                f"tenant '{tenant}' has spent its {self.of(tenant).tokens_per_minute} tokens per minute; go on in {wait:.1f} s",
                retry_after_s=math.ceil(wait * 10) / 10,
            )

    def spend(self, tenant: str, tokens: int) -> None:
        """Count tokens that a request of the tenant has used."""
        bucket = self._account(tenant).tokens
        if bucket is not None:
            bucket.take(tokens)

    def _account(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= _MOST_TENANTS:
                idle = next((name for name, one in self._accounts.items() if one.is_idle), None)
                if idle is None:
                    raise OverloadedError(f"{_MOST_TENANTS} tenants have requests open; try again later")
                del self._accounts[idle]
            limits = self.of(tenant)
            requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
            account = self._accounts[tenant] = _Account(
                None if requests is None else Bucket(requests, self._clock),
                None if tokens is None else Bucket(tokens, self._clock),
            )
        self._accounts.move_to_end(tenant)
        return account
