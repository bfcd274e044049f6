"""Consensus: the answer that agrees most with the others, of several drafts (minimum Bayes risk, Kumar & Byrne 2004).

The drafts are answers of the ensemble and of its members alone, which share the prompt, the trunk and the cache. Each is
scored by its similarity to the others, and the best one is the answer. Similarity is ROUGE-L's F measure over token ids.
So an answer that one member alone would give loses to what several say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..api.output import Completion
from ..api.request import Ensemble, Member, Request
from ..errors import InvalidRequestError
from ..schedule.admission import choice_seed


def draft_requests(request: Request) -> list[Request]:
    """One request per draft, `request.drafts` of them: the ensemble, each of its members alone, and so on in turn, each
    with a seed of its own.

    Raises `InvalidRequestError` for a greedy request with more drafts than that gives different ones.
    """
    sources = [request.ensemble]
    if len(request.ensemble.members) > 1:
        sources += [Ensemble((replace(m, mix=1.0),), request.ensemble.space) for m in _members(request.ensemble)]
    if request.sampling.temperature == 0 and request.drafts > len(sources):
        raise InvalidRequestError(
            f"drafts is {request.drafts}; a greedy answer has {len(sources)} different ones here (the ensemble, and each of "
            "its members); set a temperature above 0, or ask for fewer",
            field="drafts",
        )
    seed = request.sampling.seed
    assert seed is not None, "drafts need a seed"
    return [
        replace(
            request,
            request_id=f"{request.request_id}/{index}",
            ensemble=sources[index % len(sources)],
            sampling=replace(request.sampling, seed=choice_seed(seed, index)),
            drafts=0,
        )
        for index in range(request.drafts)
    ]


def _members(ensemble: Ensemble) -> list[Member]:
    """The members that push the mix towards what they say."""
    return [member for member in ensemble.members if member.mix > 0]


def most_agreed(drafts: Sequence[Completion]) -> int:
    """Index of the draft with the largest sum of similarities to the others; the first of those that are equal."""
    texts = [draft.token_ids for draft in drafts]
    scores = [0.0] * len(texts)
    for i in range(len(texts)):
        for j in range(i):
            value = similarity(texts[i], texts[j])
            scores[i] += value
            scores[j] += value
    return max(range(len(texts)), key=lambda index: (scores[index], -index))


def similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """ROUGE-L's F measure of two texts of token ids: 2 · LCS / (|a| + |b|); 1 if both are empty."""
    if not a or not b:
        return float(len(a) == len(b))
    matches: dict[int, int] = {}  # token → bits of the places of b that hold it
    for place, token in enumerate(b):
        matches[token] = matches.get(token, 0) | 1 << place
    whole = (1 << len(b)) - 1
    row = whole  # of the table of longest common subsequences; a bit that is 0 is a step (Hyyrö 2004)
    for token in a:
        matched = row & matches.get(token, 0)
        row = (row + matched | row - matched) & whole
    return 2 * (len(b) - row.bit_count()) / (len(a) + len(b))
