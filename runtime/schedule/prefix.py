"""Prefix sharing: an index of the full blocks of the KV cache by the digest of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..api.embedded import Spans

I64 = npt.NDArray[np.int64]
_DIGEST_BYTES = 16


def extend_digests(
    digests: list[bytes], root: bytes, token_ids: I64, count: int, block_size: int, embedded: Spans = ()
) -> None:
    """Extend `digests` to the first `count` full blocks of a sequence. A block's digest covers all tokens and `embedded` rows up
    to its end, because keys and values depend on them, and `root`: sequences with different roots never share blocks."""
    for index in range(len(digests), count):
        before, first = digests[-1] if digests else _digest(root), index * block_size
        content = before + token_ids[first : first + block_size].tobytes()
        for span in embedded:
            if span.start < first + block_size and first < span.end:
                content += span.digest + (span.start - first).to_bytes(8, "little", signed=True)
        digests.append(_digest(content))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


class PrefixIndex:
    """Digest → blocks. Blocks with equal digests hold the same keys and values of the trunk, but those of tails only
    for the members that ran over the block."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, list[int]] = {}
        self._held: dict[int, tuple[bytes, frozenset[int]]] = {}  # block → digest, members

    def __contains__(self, block: int) -> bool:
        return block in self._held

    def find(self, digest: bytes, members: Iterable[int], *, any_members: bool = False) -> int | None:
        """A block with this digest that all of `members` ran over; None if there is none. With `any_members`, another
        block with this digest will do."""
        blocks = self._blocks.get(digest, [])
        for block in blocks:
            if self._held[block][1].issuperset(members):
                return block
        return blocks[0] if any_members and blocks else None

    def digests(self) -> list[bytes]:
        return list(self._blocks)  # in one step: others may write meanwhile

    def members_of(self, block: int) -> frozenset[int]:
        """Members that ran over an indexed block; empty if it is not indexed."""
        return self._held[block][1] if block in self._held else frozenset()

    def add(self, block: int, digest: bytes, members: Iterable[int]) -> None:
        """Index a full block, unless another block already has its content. A block that is indexed has now been run
        over by these members too."""
        if block in self._held:
            known, held = self._held[block]
            assert known == digest, f"block {block} has another content"
            self._held[block] = digest, held.union(members)
        elif self.find(digest, members) is None:
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
