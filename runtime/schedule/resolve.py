"""From a request's sampling parameters to what a backend needs: the numbers of a draw, and the edits of the logits
before it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from ...kernels.oracle.edits import NO_EDITS, Edits
from ...kernels.oracle.truncation import RULES, active_rules
from ..api.sampling import SamplingParams
from .batch import ResolvedSampling

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]


class Matcher(Protocol):
    """Follows an answer through the structure that it must have (`text.grammar.GrammarMatcher`)."""

    def fork(self) -> Self:
        """An independent copy."""

    def mask(self) -> U32:
        """[ceil(vocab / 32)] the tokens that may follow (`Edits.mask`)."""

    def accept(self, token_id: int) -> None: ...

    def forced(self) -> list[int]:
        """The tokens that must follow."""

    def num_valid(self, token_ids: list[int]) -> int:
        """How many of these tokens may follow, one after the other."""

    @property
    def is_complete(self) -> bool: ...

    @property
    def failure(self) -> str: ...


def resolve_sampling(
    params: SamplingParams, seed: int, member_logprobs: bool, logprobs: bool = False
) -> ResolvedSampling:
    """The numbers of a group's draws. A greedy draw needs no truncation: no rule removes the most probable token.
    `logprobs`: report the chosen token's, also if the parameters do not ask for them."""
    candidates = params.logprob_token_ids
    return ResolvedSampling(
        temperature=params.temperature,
        truncation=active_rules({name: getattr(params, name) for name in RULES}) if params.temperature else {},
        seed=seed,
        logprobs=0 if params.logprobs is None and (logprobs or candidates) else params.logprobs,
        candidates=candidates,
        member_logprobs=member_logprobs,
    )


def force(token_id: int) -> Edits:
    """The token is drawn if its logit is finite. Its log-probability is that of the row before."""
    one = np.ones(1, np.float64)
    return Edits(np.array([token_id], np.int64), one, 0 * one, 1e30 * one)


class LogitEditor:
    """The edits of one group's next token, kept up to date as its text grows.

    In this order (see `Edits`): `repetition_penalty` on every token of prompt and answer, `presence_penalty` plus
    `frequency_penalty` times its count on every token of the answer, `logit_bias`, and -inf on the stop ids until
    `min_tokens` tokens are drawn; then the mask of `matcher`, if the answer has a structure. Each token costs one
    look-up, each step one copy of the edited entries.
    """

    def __init__(
        self,
        params: SamplingParams,
        stop_ids: Iterable[int],
        prompt_ids: Iterable[int],
        matcher: Matcher | None = None,
    ) -> None:
        self.matcher = matcher
        self._repetition = params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._min_tokens = params.min_tokens
        self._stop_ids = sorted(set(stop_ids))
        self._num_drawn = 0
        self._counts_answer = self._repetition != 1 or self._presence != 0 or self._frequency != 0
        seen = np.unique(np.fromiter(prompt_ids if self._repetition != 1 else (), np.int64))
        biased = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias))
        ids = np.union1d(seen, biased)
        self._size = len(ids)  # entries in use of the arrays below; the rest is room to grow
        self._ids: I64 = ids
        self._divisors = np.where(np.isin(ids, seen), self._repetition, 1.0)
        self._counts = np.zeros(len(ids), np.int64)  # how often each token is in the answer
        self._biases = np.zeros(len(ids), np.float64)
        self._biases[np.searchsorted(ids, biased)] = np.fromiter(params.logit_bias.values(), np.float64, len(biased))
        self._places = dict(zip(ids.tolist(), range(len(ids)), strict=True))
        self._latest: Edits | None = None

    def fork(self) -> LogitEditor:
        """An independent copy."""
        other = copy.copy(self)
        if self.matcher is not None:
            other.matcher = self.matcher.fork()
        if self._counts_answer:  # otherwise the arrays do not change any more
            other._ids, other._divisors = self._ids.copy(), self._divisors.copy()
            other._counts, other._biases = self._counts.copy(), self._biases.copy()
            other._places = dict(self._places)
        return other

    def observe(self, token_id: int) -> None:
        """Note that a token was drawn."""
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self.matcher is not None or self._counts_answer or self._num_drawn < self._min_tokens:
            self._latest = None
        self._num_drawn += 1
        if not self._counts_answer:
            return
        place = self._places.get(token_id)
        if place is None:
            place = self._add(token_id)
        self._divisors[place] = self._repetition
        self._counts[place] += 1

    def edits(self) -> Edits:
        """Edits for the token after those observed."""
        if self._latest is None:
            self._latest = self._edits()
            if self.matcher is not None:
                self._latest = dataclasses.replace(self._latest, mask=self.matcher.mask())
        return self._latest

    def edits_along(self, draft: Iterable[int]) -> list[Edits]:
        """Edits for the next token, then for the token after each draft token, as if the draft were drawn up to it."""
        found = [self.edits()]
        ahead = None
        for token_id in draft:
            ahead = ahead or self.fork()
            ahead.observe(token_id)
            found.append(ahead.edits())
        return found

    def _edits(self) -> Edits:
        used = slice(self._size)
        counts, biases = self._counts[used], self._biases[used].copy()
        with np.errstate(
            over="ignore"
        ):  # a penalty that overflows is infinite: it forbids the token, or ends the answer
            penalties = np.where(counts > 0, self._presence + self._frequency * counts, 0.0)
        ids, divisors = self._ids[used].copy(), self._divisors[used].copy()
        if self._num_drawn < self._min_tokens:
            biases[[self._places[token_id] for token_id in self._stop_ids if token_id in self._places]] = -np.inf
            others = np.array([token_id for token_id in self._stop_ids if token_id not in self._places], np.int64)
            ids = np.concatenate([ids, others])
            divisors, penalties, biases = (
                np.concatenate([values, np.full(len(others), value)])
                for values, value in ((divisors, 1.0), (penalties, 0.0), (biases, -np.inf))
            )
        return Edits(ids, divisors, penalties, biases) if len(ids) else NO_EDITS

    def _add(self, token_id: int) -> int:
        """Make an entry for a token that has none; returns its index."""
        place = self._size
        if place == len(self._ids):
            room = max(16, place)
            self._ids = np.concatenate([self._ids, np.zeros(room, np.int64)])
            self._divisors = np.concatenate([self._divisors, np.ones(room)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.int64)])
            self._biases = np.concatenate([self._biases, np.zeros(room)])
        self._ids[place] = token_id
        self._places[token_id] = place
        self._size += 1
        return place
