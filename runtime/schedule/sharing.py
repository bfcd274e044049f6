"""`PrefixSharing`: sequences that begin alike use the same full blocks of the KV cache.

A block is found by the digest of its tokens, or embedded rows, and all before them, whichever members ran over it. If the
backend keeps the trunk's output (`Backend.keeps_trunk`), a sequence takes the block although a member of its own did not run
over it: the trunk is not computed again, only the tails of the members that are missing. Otherwise a block serves only
sequences whose members all ran over it.
"""

from __future__ import annotations

from collections.abc import Hashable

from .blocks import BlockManager
from .packing import PrefillRows
from .prefix import extend_digests
from .sequence import Group, Sequence


class PrefixSharing:
    """What sequences take from the cache and give to it. `enabled` false: nothing is shared."""

    def __init__(self, blocks: BlockManager, *, enabled: bool, keeps_trunk: bool) -> None:
        self._blocks = blocks
        self._enabled = enabled
        self._keeps_trunk = keeps_trunk

    def shareable(self, sequence: Sequence) -> list[int]:
        """Cached blocks that hold the positions after those that the trunk has computed. The block of the last token is
        never among them: its row is computed."""
        done, odd = divmod(sequence.num_trunk, self._blocks.block_size)
        if odd or not self._enabled:
            return []
        digests = self._digests(sequence, (len(sequence.tokens) - 1) // self._blocks.block_size)
        return self._blocks.find(digests[done:], sequence.members, any_members=self._keeps_trunk)

    def take_over(self, group: Group, sequence: Sequence, count: int) -> None:
        """The next `count` blocks of the sequence's table now hold its trunk."""
        sequence.num_trunk += count * self._blocks.block_size
        self.skip(group, sequence)

    def skip(self, group: Group, sequence: Sequence) -> None:
        """Skip the blocks that all members of the sequence have run over by now."""
        size = self._blocks.block_size
        while sequence.num_computed < sequence.num_trunk and not self._missing(sequence, sequence.num_computed):
            step = size - sequence.num_computed % size
            sequence.num_computed += step
            if not group.num_preemptions:
                sequence.num_cached += step

    def prefill(self, group: Group, sequence: Sequence, limit: int) -> PrefillRows:
        """The next rows of the prompt, at most `limit`: rows whose trunk is cached and that lack the same members, or
        rows of all members."""
        start, size = sequence.num_computed, self._blocks.block_size
        if start == sequence.num_trunk:
            return PrefillRows(group, sequence, min(limit, sequence.num_prefill), sequence.members)
        missing = self._missing(sequence, start)
        end = start + size - start % size
        while end < min(sequence.num_trunk, start + limit) and self._missing(sequence, end) == missing:
            end += size
        return PrefillRows(group, sequence, min(limit, end - start), missing, trunk_cached=True)

    def keys(self, sequence: Sequence, count: int) -> list[Hashable]:
        """What another sequence could share of the blocks that the next `count` positions lie in, if prefill fills
        them."""
        if not self._enabled:
            return []
        size, start = self._blocks.block_size, sequence.num_computed
        digests = self._digests(sequence, min(-(-(start + count) // size), (len(sequence.tokens) - 1) // size))
        return [digest if self._keeps_trunk else (digest, sequence.members) for digest in digests[start // size :]]

    def advance(self, sequence: Sequence, count: int) -> None:
        """The cache now holds `count` more positions. Blocks that they fill may be shared. What rejected draft rows
        wrote after these positions is overwritten before it is read."""
        sequence.num_computed += count
        sequence.num_trunk = max(sequence.num_trunk, sequence.num_computed)
        size = self._blocks.block_size
        full, before = sequence.num_computed // size, (sequence.num_computed - count) // size
        if self._enabled and full > before:
            digests = self._digests(sequence, full)
            for index in range(before, full):
                self._blocks.publish(sequence.block_table[index], digests[index], sequence.members)

    def _missing(self, sequence: Sequence, position: int) -> tuple[int, ...]:
        """Members of the sequence that have not run over the cached block of a position."""
        held = self._blocks.members_of(sequence.block_table[position // self._blocks.block_size])
        return tuple(member for member in sequence.members if member not in held)

    def _digests(self, sequence: Sequence, count: int) -> list[bytes]:
        """Digests of the first `count` blocks of the sequence; its tokens must fill them."""
        size, token_ids = self._blocks.block_size, sequence.tokens.array()
        extend_digests(sequence.digests, sequence.root, token_ids, count, size, sequence.embedded)
        return sequence.digests[:count]
