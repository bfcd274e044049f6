"""Prefix sharing: an index of the full blocks of the KV cache by the digest of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
_DIGEST_BYTES = 16


def extend_digests(
    digests: list[bytes], root: bytes, adapter: int, token_ids: I64, count: int, block_size: int
) -> None:
    """Extend `digests` to the first `count` full blocks of a sequence. A block's digest covers the adapter and all
    tokens up to its end, because keys and values depend on them, and `root`: sequences with different roots never
    share blocks."""
    for index in range(len(digests), count):
        before = digests[-1] if digests else _digest(adapter.to_bytes(_DIGEST_BYTES, "little", signed=True) + root)
        digests.append(_digest(before + token_ids[index * block_size : (index + 1) * block_size].tobytes()))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


class PrefixIndex:
    """Digest → blocks. Blocks with equal digests hold the same keys and values of the trunk, but those of tails only
    for the members that ran over the block. So a block serves only sequences whose members are among these."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, list[int]] = {}
        self._held: dict[int, tuple[bytes, frozenset[int]]] = {}  # block → digest, members

    def __contains__(self, block: int) -> bool:
        return block in self._held

    def find(self, digest: bytes, members: Iterable[int]) -> int | None:
        """A block with this digest that all of `members` ran over; None if there is none."""
        for block in self._blocks.get(digest, ()):
            if self._held[block][1].issuperset(members):
                return block
        return None

    def add(self, block: int, digest: bytes, members: Iterable[int]) -> None:
        """Index a full block, unless another block already has its content."""
        if self.find(digest, members) is None:
            assert block not in self._held, f"block {block} is full twice"
            self._blocks.setdefault(digest, []).append(block)
            self._held[block] = digest, frozenset(members)

    def remove(self, block: int) -> None:
        digest, _ = self._held.pop(block)
        self._blocks[digest].remove(block)
        if not self._blocks[digest]:
            del self._blocks[digest]

    def check_integrity(self) -> None:
        """Assert that both maps agree."""
        pairs = [(block, digest) for digest, blocks in self._blocks.items() for block in blocks]
        assert sorted(pairs) == sorted((block, digest) for block, (digest, _) in self._held.items())
