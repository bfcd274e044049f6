"""`Identity`: who calls, for which tenant, and in which roles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from ..errors import PermissionDeniedError


class Role(StrEnum):
    """What a caller may do. No role includes another."""

    INFER = "infer"  # generate, tokenise, ask what is served
    BATCH = "batch"  # the same behind all interactive requests, and batch jobs
    MONITOR = "monitor"  # metrics, load
    ADMIN = "admin"  # take the server out of service


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller. `tenant`: whose queue, quotas and cached prefixes it uses; `subject`: the key or the person."""

    tenant: str
    subject: str
    roles: frozenset[Role]

    def require(self, allowed: Iterable[Role]) -> None:
        """Raises `PermissionDeniedError` unless the caller has one of these roles."""
        allowed = sorted(allowed)
        if self.roles.isdisjoint(allowed):
            have = ", ".join(sorted(self.roles)) or "none"
            raise PermissionDeniedError(
                f"this needs the role {' or '.join(allowed)}, and this caller's roles are: {have}; use another key"
            )

    @property
    def is_background(self) -> bool:
        """Whether its requests run behind all interactive ones."""
        return Role.BATCH in self.roles and Role.INFER not in self.roles


def anonymous(*, may_drain: bool = False) -> Identity:
    """Every caller of a server without authentication."""
    roles = set(Role) if may_drain else set(Role) - {Role.ADMIN}
    return Identity("", "anonymous", frozenset(roles))
