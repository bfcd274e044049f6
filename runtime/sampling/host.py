"""Mixing and sampling on the host, for backends whose logits arrive as numpy rows. Same tokens as `kernels.reference`.

The native kernels do it where they were built (`kernels.cpu_sample`); what follows is for where they were not. What makes
it fast: a greedy row is one argmax; otherwise only candidates that can still win are drawn. The noise of a
23-bit uniform lies in [−2.81, 16.64], so a token more than its span below the best score so far has no chance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...kernels.native import binding as cpu
from ...kernels.native import sampling as cpu_sample
from ...kernels.oracle.reference import gumbel, mix, penalise, truncate
from ..api.request import Space
from ..schedule.batch import SampleRow, StepOutput

F32 = npt.NDArray[np.float32]
Row = npt.NDArray[Any]  # [vocab] float32 (a member as it is) or float64 (a mix)

LARGEST_GUMBEL = -math.log(-math.log(1 - 2.0**-24))
_FIRST_DRAWN = 32

_NOT_FINITE = "the logits hold NaN or infinity"
_NOTHING_LEFT = "no token is left to choose"


def sample_rows(
    logits: F32, row_terms: Sequence[Sequence[tuple[int, float]]], samples: Sequence[SampleRow]
) -> StepOutput:
    """Draw one token for each sample.

    logits [R, vocab]; `row_terms[i]` are the (row, coefficient) terms of `samples[i]`. Rows are independent: a result
    does not depend on what else is in the batch. A row with NaN or +inf, or with no token left, has an entry in `errors`.
    """
    if samples and _has_native():
        natives = native_samples(row_terms, samples)
        return step_output(natives, cpu_sample.sample(logits, natives))
    return _sample_numpy(logits, row_terms, samples)


@functools.cache
def _has_native() -> bool:
    return cpu.is_available()


def native_samples(
    row_terms: Sequence[Sequence[tuple[int, float]]], samples: Sequence[SampleRow]
) -> list[cpu_sample.Sample]:
    """As the native kernels take them."""
    return [_native(terms, sample) for terms, sample in zip(row_terms, samples, strict=True)]


def step_output(natives: Sequence[cpu_sample.Sample], result: cpu_sample.Sampled) -> StepOutput:
    """What the native kernels have drawn."""
    output = StepOutput(result.token_ids, result.logprobs, [[] for _ in natives], [[] for _ in natives])
    for index, code in enumerate(result.codes.tolist()):
        if code:
            output.errors[index] = _NOT_FINITE if code == cpu_sample.NOT_FINITE else _NOTHING_LEFT
    first = 0
    for index, native in enumerate(natives):
        end = first + len(native.terms)
        if native.logprobs and index not in output.errors:
            best = zip(result.top_ids[index].tolist(), result.top_logprobs[index].tolist(), strict=True)
            output.top_logprobs[index] = [one for one in best if one[0] >= 0][: native.logprobs]
        if native.member_logprobs and index not in output.errors:
            output.member_logprobs[index] = result.member_logprobs[first:end].tolist()
        first = end
    return output


def _native(terms: Sequence[tuple[int, float]], sample: SampleRow) -> cpu_sample.Sample:
    params = sample.params
    return cpu_sample.Sample(
        terms=terms,
        probs=sample.space is Space.PROBS,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        prompt_ids=sample.prompt_ids,
        output_ids=sample.output_ids,
        bias=params.logit_bias,
        forbidden=sample.forbidden_ids,
        seed=sample.seed,
        position=sample.position,
        logprobs=params.logprobs,
        member_logprobs=sample.return_member_logprobs,
    )


def _sample_numpy(
    logits: F32, row_terms: Sequence[Sequence[tuple[int, float]]], samples: Sequence[SampleRow]
) -> StepOutput:
    output = StepOutput(
        token_ids=np.zeros(len(samples), np.int64),
        logprobs=np.full(len(samples), np.nan),
        top_logprobs=[[] for _ in samples],
        member_logprobs=[[] for _ in samples],
    )
    for index, (terms, sample) in enumerate(zip(row_terms, samples, strict=True)):
        if len(terms) == 1 and terms[0][1] == 1:
            mixed: Row = logits[terms[0][0]]
        else:
            mixed = mix(logits[[row for row, _ in terms]], [c for _, c in terms], sample.space)
        token_id = _draw(mixed, sample)
        if isinstance(token_id, str):
            output.errors[index] = token_id
            continue
        output.token_ids[index] = token_id
        if sample.params.logprobs is not None:
            logprobs = _log_softmax(mixed)
            output.logprobs[index] = logprobs[token_id]
            output.top_logprobs[index] = _top(logprobs, sample.params.logprobs)
        if sample.return_member_logprobs:
            output.member_logprobs[index] = [float(_log_softmax(logits[row])[token_id]) for row, _ in terms]
    return output


def _draw(mixed: Row, sample: SampleRow) -> int | str:
    """The token, or why there is none."""
    params = sample.params
    adjusted = _penalise(mixed, sample)
    best = int(np.argmax(adjusted))
    if not max(mixed.max(), adjusted[best]) < np.inf:  # numpy's max of a row with NaN is NaN
        return _NOT_FINITE
    if adjusted[best] == -np.inf:
        return _NOTHING_LEFT
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
    count = min(count, len(logprobs))
    least = np.partition(logprobs, len(logprobs) - count)[-count]
    best = np.flatnonzero(logprobs >= least)  # more than count where the last ones are equal
    best = best[np.lexsort((best, -logprobs[best]))][:count]
    return [(int(token_id), float(logprobs[token_id])) for token_id in best]
