"""Which replica a request goes to: the one that has the least to compute before its first token. That is the prompts that wait
there, and the part of this one that its prefix cache does not hold. Replicas publish both; what was sent to them from here is
known here. It knows nothing of Ray."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ..api.request import Request
from ..schedule.prefix import extend_digests

KEY_BYTES = 8  # of a block's digest: a wrong match costs time and nothing else
_MOST_RECENT = 65_536  # blocks that were sent to a replica and may not have been published yet
RUNNING_TOKENS = 16  # what an answer that runs is counted as, in tokens of a prompt


def block_keys(request: Request, block_size: int) -> tuple[bytes, ...]:
    """The key of each full block of the request's own prompt but the last token's, which is always computed."""
    return _keys(request.prompts[0], request.cache_salt, block_size)


@lru_cache(256)  # a request is compared with every replica
def _keys(prompt: tuple[int, ...], root: bytes, block_size: int) -> tuple[bytes, ...]:
    digests: list[bytes] = []
    extend_digests(digests, root, np.array(prompt, np.int64), (len(prompt) - 1) // block_size, block_size)
    return tuple(digest[:KEY_BYTES] for digest in digests)


def pack_keys(digests: Sequence[bytes]) -> bytes:
    """Digests as a replica publishes them."""
    return b"".join(digest[:KEY_BYTES] for digest in digests)


@dataclass(slots=True)
class _Replica:
    """`block_size` 0: it has not published anything."""

    version: int = -1  # of what it has published
    block_size: int = 0
    keys: frozenset[bytes] = frozenset()
    tokens: int = 0  # that wait there
    open: dict[str, int] = field(default_factory=dict)  # requests from here that are open there → tokens to compute
    recent: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # keys of blocks that it was sent

    def missing(self, request: Request) -> int:
        """Tokens of the request's prompts that it would have to compute."""
        count, keys = 0, self.keys_of(request)
        while count < len(keys) and (keys[count] in self.keys or keys[count] in self.recent):
            count += 1
        return sum(map(len, request.prompts)) - count * self.block_size

    def keys_of(self, request: Request) -> tuple[bytes, ...]:
        return block_keys(request, self.block_size) if self.block_size else ()


class PrefixRouting:
    """The replicas that are known, by name. Its methods may be called in any order. `by_prefix` False: what is cached does not
    count."""

    def __init__(self, *, by_prefix: bool = True) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._by_prefix = by_prefix

    def update(self, published: Mapping[str, Mapping[str, Any]]) -> None:
        """What the replicas that there are have published: {"version", "keys", "tokens", "block_size"}, or nothing yet."""
        self._replicas = {name: self._replicas.get(name) or _Replica() for name in published}
        for name, found in published.items():
            replica = self._replicas[name]
            if not found or found["version"] == replica.version:
                continue
            packed = found["keys"]
            replica.version, replica.tokens = found["version"], found["tokens"]
            replica.block_size = found["block_size"] if self._by_prefix else 0
            replica.keys = frozenset(packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES))

    def rank(self, request: Request | None) -> list[str]:
        """The replicas, the best first. `request` None: one whose prompt is not known."""

        def cost(name: str) -> tuple[int, str]:
            replica = self._replicas[name]
            missing = 0 if request is None else replica.missing(request)
            return max(replica.tokens, sum(replica.open.values())) + missing, name

        return sorted(self._replicas, key=cost)

    def ended(self, name: str, id: str) -> None:
        """A request is not open any more."""
        if (replica := self._replicas.get(name)) is not None:
            replica.open.pop(id, None)

    def sent(self, name: str, id: str, request: Request | None) -> None:
        """A request was sent to a replica; `id` is for `ended`."""
        replica = self._replicas.get(name)
        if replica is None or request is None:
            return
        replica.open[id] = replica.missing(request) + RUNNING_TOKENS
        for key in replica.keys_of(request):
            replica.recent[key] = None
            replica.recent.move_to_end(key)
        while len(replica.recent) > _MOST_RECENT:
            replica.recent.popitem(last=False)
