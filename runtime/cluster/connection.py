"""`connect`: to a Ray cluster, or to one that it starts on this machine."""

from __future__ import annotations

import os
from typing import Any

import ray

from ..errors import UnavailableError


def connect(address: str, cpus: int) -> None:
    """To the cluster at `address`; "auto": the one of this machine; "local": one that lives as long as this process, with `cpus`
    for engines. Raises `UnavailableError`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    own: dict[str, Any] = {"include_dashboard": False, "num_cpus": cpus + 1} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, **own)  # "local" takes no other cluster of this machine
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UnavailableError(f"there is no Ray cluster at '{address}': {error}") from None
