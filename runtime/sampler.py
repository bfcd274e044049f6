"""Mixing and sampling on the host, for backends whose logits arrive as numpy rows. Same tokens as `kernels.reference`.

What makes it fast: a greedy row is one argmax; otherwise only candidates that can still win are drawn. The noise of a
24-bit uniform lies in [−2.86, 17.33], so a token more than its span below the best score so far has no chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.reference import gumbel, mix, penalise, truncate
from .batch import SampleRow, StepOutput

F32 = npt.NDArray[np.float32]
Row = npt.NDArray[Any]  # [vocab] float32 (a member as it is) or float64 (a mix)

LARGEST_GUMBEL = -math.log(-math.log(1 - 2.0**-25))
_FIRST_DRAWN = 32


def sample_rows(
    logits: F32, row_terms: Sequence[Sequence[tuple[int, float]]], samples: Sequence[SampleRow]
) -> StepOutput:
    """Draw one token for each sample.

    logits [R, vocab]; `row_terms[i]` are the (row, coefficient) terms of `samples[i]`. Rows are independent: a result
    does not depend on what else is in the batch. A row with NaN, or with no token left, has an entry in `errors`.
    """
    output = StepOutput(
        token_ids=np.zeros(len(samples), np.int64),
        logprobs=np.full(len(samples), np.nan, np.float32),
        top_logprobs=[[] for _ in samples],
        member_logprobs=[[] for _ in samples],
    )
    for index, (terms, sample) in enumerate(zip(row_terms, samples, strict=True)):
        if len(terms) == 1 and terms[0][1] == 1:
            mixed: Row = logits[terms[0][0]]
        else:
            mixed = mix(logits[[row for row, _ in terms]], [c for _, c in terms], sample.space)
        token_id = _draw(mixed, sample)
        if token_id is None:
            output.errors[index] = "the logits hold NaN or leave no token to choose"
            continue
        output.token_ids[index] = token_id
        if sample.params.logprobs is not None:
            logprobs = _log_softmax(mixed)
            output.logprobs[index] = logprobs[token_id]
            output.top_logprobs[index] = _top(logprobs, sample.params.logprobs)
        if sample.return_member_logprobs:
            output.member_logprobs[index] = [float(_log_softmax(logits[row])[token_id]) for row, _ in terms]
    return output


def _draw(mixed: Row, sample: SampleRow) -> int | None:
    params = sample.params
    adjusted = _penalise(mixed, sample)
    best = int(np.argmax(adjusted))  # numpy's argmax of a row with NaN is a NaN
    if not adjusted[best] > -np.inf or adjusted[best] == np.inf:
        return None
    if params.temperature == 0:
        return best
    tempered = adjusted.astype(np.float64) / params.temperature
    if params.top_k or params.top_p < 1 or params.min_p:
        tempered = _truncate(tempered, params.top_k, params.top_p, params.min_p)
    return _gumbel_argmax(tempered, sample)


def _penalise(mixed: Row, sample: SampleRow) -> Row:
    params = sample.params
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    if penalties == (1.0, 0.0, 0.0) and not params.logit_bias and not sample.forbidden_ids:
        return mixed
    return penalise(
        mixed.astype(np.float64),
        sample.prompt_ids,
        sample.output_ids,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        bias=params.logit_bias,
        forbidden=sample.forbidden_ids,
    )


def _truncate(tempered: npt.NDArray[np.float64], top_k: int, top_p: float, min_p: float) -> npt.NDArray[np.float64]:
    """As `truncate`, -inf for what goes. Sorting the whole vocabulary is what costs, so it is cut down first: to the k
    largest, or, for top-p alone, to the tokens that cannot all be left out."""
    if 0 < top_k < len(tempered):
        threshold = np.partition(tempered, len(tempered) - top_k)[-top_k]
        tempered = np.where(tempered >= threshold, tempered, -np.inf)
    alive = np.flatnonzero(tempered > -np.inf)
    kept = alive[truncate(tempered[alive], 0, top_p, min_p)]
    result = np.full_like(tempered, -np.inf)
    result[kept] = tempered[kept]
    return result


def _gumbel_argmax(tempered: npt.NDArray[np.float64], sample: SampleRow) -> int:
    """argmax of tempered + noise, drawing only for tokens that can win: first the best few, then what they leave over."""
    count = min(_FIRST_DRAWN, len(tempered))
    first = np.argpartition(tempered, len(tempered) - count)[-count:]
    score = tempered[first] + gumbel(first, sample.position, sample.seed)
    candidates = np.flatnonzero(tempered + LARGEST_GUMBEL >= score.max())  # ascending, so that ties take the lowest id
    scores = tempered[candidates] + gumbel(candidates, sample.position, sample.seed)
    return int(candidates[np.argmax(scores)])


def _log_softmax(logits: Row) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - math.log(float(np.exp(shifted).sum())))


def _top(logprobs: npt.NDArray[np.float64], count: int) -> list[tuple[int, float]]:
    if count == 0:
        return []
    best = np.argpartition(-logprobs, min(count, len(logprobs) - 1))[:count]
    best = best[np.lexsort((best, -logprobs[best]))]
    return [(int(token_id), float(logprobs[token_id])) for token_id in best]
