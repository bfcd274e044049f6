"""Callers of a service, as a door would name them."""

from __future__ import annotations

from motet.runtime.serve.calls import Caller
from motet.runtime.trust.identity import Identity, Role, anonymous

CALLER = Caller(anonymous())


def caller(tenant, *roles, subject="key:1"):
    return Caller(Identity(tenant, subject, frozenset(roles or (Role.INFER,))))
