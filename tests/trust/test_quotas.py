"""What a tenant may do: rates, open requests, places."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from motet.runtime import errors
from motet.runtime.trust import quotas as module
from motet.runtime.trust.quotas import Bucket, Quotas, TenantLimits, read_limits


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def make(places=100, **tables):
    clock = Clock()
    return Quotas(read_limits(tables), places, clock), clock


def use(quotas, tenant="a"):
    with quotas.open(tenant):
        pass


def test_a_bucket():
    clock = Clock()
    bucket = Bucket(60, clock)
    assert bucket.wait_s(60) == 0
    bucket.take(90)  # what an answer cost
    assert bucket.wait_s(1) == 31
    clock.now = 31
    assert bucket.wait_s(1) == 0
    clock.now = 1000
    assert bucket.wait_s(1000) == 0  # more than a bucket holds needs a full one
    bucket.take(1)
    assert bucket.wait_s(1000) == 1


def test_requests_per_minute():
    quotas, clock = make(a={"requests_per_minute": 2})
    use(quotas)
    use(quotas)
    with pytest.raises(errors.OverloadedError, match="2 requests per minute") as caught:
        use(quotas)
    assert caught.value.retry_after_s == 30
    use(quotas, "b")  # another's is its own
    clock.now = 30
    use(quotas)


def test_tokens_per_minute():
    quotas, clock = make(default={"tokens_per_minute": 600})
    quotas.check_tokens("a", 600)
    quotas.spend("a", 600)
    quotas.spend("a", 100)  # the answer
    with pytest.raises(errors.OverloadedError, match="600 tokens per minute") as caught:
        quotas.check_tokens("a", 50)
    assert caught.value.retry_after_s == 15
    quotas.check_tokens("b", 600)
    clock.now = 15
    quotas.check_tokens("a", 50)


def test_open_requests():
    quotas, _ = make(a={"max_requests": 2})
    with ExitStack() as stack:
        stack.enter_context(quotas.open("a"))
        stack.enter_context(quotas.open("a"))
        with pytest.raises(errors.OverloadedError, match="has 2 requests open"):
            use(quotas)
        use(quotas, "b")
    use(quotas)
    assert quotas.num_open == 0


def test_no_tenant_takes_all_places():
    quotas, _ = make(places=4)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(quotas.open("a"))
        with pytest.raises(errors.OverloadedError, match="max_requests"):
            use(quotas)
        for _ in range(2):
            stack.enter_context(quotas.open("b"))
        with pytest.raises(errors.OverloadedError):
            use(quotas, "c")
    with ExitStack() as stack:
        for _ in range(4):  # without tenants there is nobody to leave room for
            stack.enter_context(quotas.open(""))


def test_accounts_are_forgotten(monkeypatch):
    monkeypatch.setattr(module, "_MOST_TENANTS", 2)
    quotas, _ = make()
    for name in "abcde":
        use(quotas, name)
    with quotas.open("x"), quotas.open("y"), pytest.raises(errors.OverloadedError, match="2 tenants"):
        use(quotas, "z")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"weight": 0}, "weight must be a number"),
        ({"weight": True}, "weight must be a number"),
        ({"max_requests": 0}, "max_requests must be an integer"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute must be an integer"),
        ({"token_per_minute": 1}, "unknown TenantLimits key"),
    ],
)
def test_limits_that_are_refused(table, message):
    with pytest.raises(errors.ConfigError, match=f"tenant 'acme': {message}"):
        read_limits({"acme": table})
    with pytest.raises(errors.ConfigError, match="must be a table"):
        read_limits({"acme": 3})


def test_the_default_is_for_those_that_are_not_named():
    quotas, _ = make(default={"weight": 2.0}, acme={"weight": 3.0})
    assert [quotas.of(name).weight for name in ("acme", "other")] == [3.0, 2.0]
    assert Quotas({}, 1).of("x") == TenantLimits()
