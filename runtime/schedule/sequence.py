"""`Sequence`, the token ids of one view, and `Group`, all sequences of one choice of a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from ..api.embedded import Spans
from ..api.request import Owner, Space
from ..api.sampling import SamplingParams
from .batch import ResolvedSampling
from .drafts import Drafter, StepLoad
from .resolve import LogitEditor, resolve_sampling

I64 = npt.NDArray[np.int64]


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class TokenBuffer:
    """Token ids that grow at the end. `array()` copies nothing."""

    def __init__(self, token_ids: tuple[int, ...] = ()) -> None:
        self._array = np.array(token_ids or (0,), np.int64)
        self._size = len(token_ids)

    def hide(self, count: int) -> I64:
        """Take the last `count` tokens away, and return them."""
        self._size -= count
        return self._array[self._size : self._size + count].copy()

    def __len__(self) -> int:
        return self._size

    def append(self, token_id: int) -> None:
        if self._size == len(self._array):
            self._array = np.concatenate([self._array, np.empty_like(self._array)])
        self._array[self._size] = token_id
        self._size += 1

    def array(self) -> I64:  # [tokens]
        return self._array[: self._size]

    def tail(self, first: int, count: int | None = None) -> list[int]:
        """Tokens from `first` on, at most `count` of them."""
        end = self._size if count is None else min(first + count, self._size)
        ids: list[int] = self._array[first:end].tolist()
        return ids


class Sequence:
    """The tokens of one view of a group, prompt and answer, and where the KV cache holds how many of them."""

    __slots__ = (
        "block_table",
        "digests",
        "embedded",
        "members",
        "num_cached",
        "num_computed",
        "num_prompt",
        "num_trunk",
        "root",
        "tokens",
    )

    def __init__(
        self, prompt: tuple[int, ...], members: tuple[int, ...], *, root: bytes = b"", embedded: Spans = ()
    ) -> None:
        self.tokens = TokenBuffer(prompt)
        self.num_prompt = len(prompt)
        self.members = members  # indices of the bundle's members that run over its rows, ascending
        self.embedded = embedded  # positions of the prompt whose rows are given, in order
        self.root = root  # sequences with different roots share no blocks, whatever their tokens are
        self.num_computed = 0  # positions in the KV cache, for all members
        self.num_trunk = 0  # positions in the KV cache of the trunk, at least as many; more only at whole blocks
        self.num_cached = 0  # of these, positions found in the prefix cache before the first preemption
        self.block_table: list[int] = []
        self.digests: list[bytes] = []  # of its first full blocks; extended on demand

    @property
    def num_prefill(self) -> int:
        """Rows still to compute before the row of the last token, which is always a decode row."""
        return len(self.tokens) - 1 - self.num_computed


@dataclass(slots=True, eq=False)
class Group:
    """All sequences of one choice. They are admitted, preempted, cancelled and freed together, and every token of the
    answer is appended to all of them."""

    request_id: str
    choice: int
    sequences: list[Sequence]
    terms: tuple[tuple[int, int, float], ...]  # (index into sequences, member index, coefficient)
    space: Space
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_ids: frozenset[int]  # end-of-sequence and stop token ids
    editor: LogitEditor  # sees every token of the answer
    temperatures: tuple[float, ...] = ()  # [terms] by which the logits of each are divided; empty: all are 1
    return_member_logprobs: bool = False
    return_logprobs: bool = False  # the chosen token's, also if the parameters do not ask for them
    drafter: Drafter | None = None  # None: no speculation
    num_to_score: int = 0  # of the prompt's last tokens: they are drawn by force, for their log-probabilities
    can_verify: bool = False  # several rows of a sequence may be sampled in a step
    max_forced: int = 0  # most tokens that are drafted because the answer's structure forces them
    priority: int = 0
    owner: Owner = field(default_factory=Owner)
    status: SequenceStatus = SequenceStatus.WAITING
    num_preemptions: int = 0
    num_passed: int = 0  # groups that came later and were started before it
    output: TokenBuffer = field(default_factory=TokenBuffer)
    sampling: ResolvedSampling = field(init=False)
    scoring: ResolvedSampling = field(init=False)  # of the prompt's tokens
    unscored: I64 = field(init=False)  # tokens of the prompt that are still to be drawn by force

    def __post_init__(self) -> None:
        self.sampling = resolve_sampling(self.params, self.seed, self.return_member_logprobs, self.return_logprobs)
        self.scoring = ResolvedSampling(temperature=0.0, logprobs=self.params.prompt_logprobs)
        self.unscored = self.sequences[0].tokens.hide(self.num_to_score)

    @property
    def max_draft(self) -> int:
        """Most tokens of a draft; 0 or less: none."""
        if len(self.unscored):
            return len(self.unscored) if self.can_verify else 0
        most = max(self.max_forced, self.drafter.max_tokens if self.drafter is not None else 0)
        return min(most, self.max_tokens - len(self.output) - 1)

    def draft(self, limit: int, load: StepLoad) -> I64:
        """A draft of at most `limit` tokens, none of which the answer's structure forbids; often empty. It is added to
        `load`. What the structure forces comes before a guess."""
        if len(self.unscored):
            load.rows += limit * len(self.sequences)
            load.tokens += limit
            return self.unscored[:limit]
        matcher = self.editor.matcher
        if self.max_forced and matcher is not None and (forced := matcher.forced()[:limit]):
            load.rows += len(self.sequences) * len(forced)
            load.tokens += len(forced)
            return np.array(forced, np.int64)
        if self.drafter is None:
            return np.empty(0, np.int64)
        limit = min(limit, self.drafter.max_tokens)
        found = self.drafter.propose(self.sequences[0].tokens.array(), limit, load, len(self.sequences))
        return found if matcher is None else found[: matcher.num_valid(found.tolist())]

    @property
    def is_stuck(self) -> bool:
        """Whether the answer's structure allows no token any more."""
        return self.editor.matcher is not None and not self.editor.matcher.mask().any()

    def append(self, token_id: int) -> None:
        if len(self.unscored):
            token_id, self.unscored = int(self.unscored[0]), self.unscored[1:]
            for sequence in self.sequences:
                sequence.tokens.append(token_id)
            return
        self.output.append(token_id)
        self.editor.observe(token_id)
        for sequence in self.sequences:
            sequence.tokens.append(token_id)
        if self.drafter is not None:
            self.drafter.observe(self.sequences[0].tokens.array())
