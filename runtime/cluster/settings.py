"""`ClusterSettings`: where an engine's replicas run, and how many. It imports nothing of Ray."""

from __future__ import annotations

from dataclasses import dataclass

from ..api.config import EngineConfig
from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Raises `ConfigError`."""

    address: str  # of a Ray cluster; "auto": the one that this machine belongs to; "local": one of this machine's own
    replicas: int = 2  # at least
    max_replicas: int | None = None  # None: always `replicas`
    queued_tokens: int = 4096  # that wait at a replica before there shall be one more
    orphaned_s: float = 120.0  # seconds without word of the server, after which its replicas end themselves
    by_prefix: bool = (
        True  # False: requests go where the fewest tokens wait, whatever is cached there (for measurements)
    )

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.most < self.replicas or self.queued_tokens < 1:
            raise ConfigError(
                f"replicas must be at least 1, max_replicas at least replicas, and queued_tokens at least 1; got "
                f"{self.replicas}, {self.max_replicas} and {self.queued_tokens}"
            )

    @property
    def most(self) -> int:
        return self.max_replicas or self.replicas

    def threads(self, config: EngineConfig) -> int:
        """Of each replica, and so the CPUs that Ray reserves for it."""
        return config.threads or 1
