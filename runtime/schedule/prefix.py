"""Prefix sharing: which full blocks of the KV cache hold what, by digest."""

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
    """Make `digests` those of the first `count` full blocks of a sequence. A block's digest covers its adapter and all
    tokens up to its end, because keys and values depend on all of them, and `root`, which keeps sequences apart that must
    not share although these are equal."""
    for index in range(len(digests), count):
        before = digests[-1] if digests else _digest(adapter.to_bytes(_DIGEST_BYTES, "little", signed=True) + root)
        digests.append(_digest(before + token_ids[index * block_size : (index + 1) * block_size].tobytes()))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


class PrefixIndex:
    """Digest → blocks. The trunk's part of equal digests is equal, but a tail's part is there only for the members that
    ran over the block: it serves a sequence whose members are among them."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, list[int]] = {}
        self._held: dict[int, tuple[bytes, frozenset[int]]] = {}  # block → digest, members

    def __contains__(self, block: int) -> bool:
        return block in self._held

    def find(self, digest: bytes, members: Iterable[int]) -> int | None:
        """A block with this content for all of these members."""
        for block in self._blocks.get(digest, ()):
            if self._held[block][1].issuperset(members):
                return block
        return None

    def add(self, block: int, digest: bytes, members: Iterable[int]) -> None:
        """A block is full. One whose content another block has already is not indexed."""
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
        """Assert that both directions agree."""
        pairs = [(block, digest) for digest, blocks in self._blocks.items() for block in blocks]
        assert sorted(pairs) == sorted((block, digest) for block, (digest, _) in self._held.items())
