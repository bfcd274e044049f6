"""Mixing and sampling on the host, for backends whose logits arrive as numpy rows. Same tokens as `kernels.oracle.reference`.

If the native kernels were built (`kernels.native.sampling`), they sample the rows whose truncation rules they have;
the numpy code of this file samples the others. A greedy row is one argmax. Otherwise noise is drawn only for tokens
that can still win: the noise of a 23-bit uniform lies in [−2.81, 16.64], so most tokens are too far below the best
score so far.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...kernels.native import library
from ...kernels.native import sampling as cpu_sample
from ...kernels.oracle.edits import apply_edits
from ...kernels.oracle.reference import gumbel, is_greedy, mix
from ...kernels.oracle.truncation import truncate
from ..api.request import Space
from ..schedule.batch import SampleRow, StepOutput
from .terms import Terms, is_single

F32 = npt.NDArray[np.float32]
Row = npt.NDArray[Any]  # [vocab] float32 (one member) or float64 (a mix)

LARGEST_GUMBEL = -math.log(-math.log(1 - 2.0**-24))
_FIRST_DRAWN = 32

_NOT_FINITE = "the logits hold NaN or infinity"
_NOTHING_LEFT = "no token is left to choose"


def sample_rows(logits: F32, row_terms: Sequence[Terms], samples: Sequence[SampleRow]) -> StepOutput:
    """Draw one token for each sample.

    logits [R, vocab]; `row_terms[i]` are the (row, coefficient) terms of `samples[i]`. Samples are independent: a
    result does not depend on the rest of the batch. A sample whose mix has NaN or +inf, or no token left, has an
    entry in `errors`.
    """
    if not samples or not _has_native():
        return _sample_numpy(logits, row_terms, samples)
    fused, others = split_fused(samples, cpu_sample.FUSED_RULES)
    natives = native_samples([row_terms[i] for i in fused], [samples[i] for i in fused])
    output = step_output(natives, cpu_sample.sample(logits, natives))
    if not others:
        return output
    rest = _sample_numpy(logits, [row_terms[i] for i in others], [samples[i] for i in others])
    return merge_outputs([(fused, output), (others, rest)])


@functools.cache
def _has_native() -> bool:
    return library.is_available()


def split_fused(samples: Sequence[SampleRow], rules: Collection[str]) -> tuple[list[int], list[int]]:
    """Indices of the samples that use no truncation rules but `rules`, and of the others."""
    known = set(rules)
    fused = [sample.sampling.truncation.keys() <= known for sample in samples]
    return [i for i, can in enumerate(fused) if can], [i for i, can in enumerate(fused) if not can]


def empty_output(count: int) -> StepOutput:
    """An output for `count` samples, to be filled in: every token is 0, the rest is empty."""
    return StepOutput(
        token_ids=np.zeros(count, np.int64),
        logprobs=np.full(count, np.nan),
        top_logprobs=[[] for _ in range(count)],
        member_logprobs=[[] for _ in range(count)],
        candidate_logprobs=[[] for _ in range(count)],
    )


def merge_outputs(parts: Sequence[tuple[Sequence[int], StepOutput]]) -> StepOutput:
    """Join several outputs. Each part is (indices of its samples, their output); every sample is in one part."""
    merged = empty_output(sum(len(index) for index, _ in parts))
    for index, output in parts:
        put_output(merged, index, output)
    return merged


def put_output(target: StepOutput, index: Sequence[int], output: StepOutput) -> None:
    """Copy the entries of `output` to the indices `index` of `target`."""
    target.token_ids[index], target.logprobs[index] = output.token_ids, output.logprobs
    for name in ("top_logprobs", "member_logprobs", "candidate_logprobs"):
        lists = getattr(target, name)
        for place, values in zip(index, getattr(output, name), strict=True):
            lists[place] = values
    target.errors |= {index[place]: error for place, error in output.errors.items()}


def native_samples(row_terms: Sequence[Terms], samples: Sequence[SampleRow]) -> list[cpu_sample.Sample]:
    """The samples in the native kernels' form."""
    return [_native(terms, sample) for terms, sample in zip(row_terms, samples, strict=True)]


def step_output(natives: Sequence[cpu_sample.Sample], result: cpu_sample.Sampled) -> StepOutput:
    """The native kernels' result as a `StepOutput`."""
    output = empty_output(len(natives))
    output.token_ids, output.logprobs = result.token_ids, result.logprobs
    for index, code in enumerate(result.codes.tolist()):
        if code:
            output.errors[index] = _NOT_FINITE if code == cpu_sample.NOT_FINITE else _NOTHING_LEFT
    first = first_candidate = 0
    for index, native in enumerate(natives):
        end, end_candidate = first + len(native.terms), first_candidate + len(native.candidates)
        if native.logprobs and index not in output.errors:
            best = zip(result.top_ids[index].tolist(), result.top_logprobs[index].tolist(), strict=True)
            output.top_logprobs[index] = [one for one in best if one[0] >= 0][: native.logprobs]
        if native.member_logprobs and index not in output.errors:
            output.member_logprobs[index] = result.member_logprobs[first:end].tolist()
        if native.candidates and index not in output.errors:
            output.candidate_logprobs[index] = result.candidate_logprobs[first_candidate:end_candidate].tolist()
        first, first_candidate = end, end_candidate
    return output


def _native(terms: Terms, sample: SampleRow) -> cpu_sample.Sample:
    sampling = sample.sampling
    return cpu_sample.Sample(
        terms=terms,
        probs=sample.space is Space.PROBS,
        temperature=sampling.temperature,
        truncation=sampling.truncation,
        edits=sample.edits,
        seed=sampling.seed,
        position=sample.position,
        logprobs=sampling.logprobs,
        candidates=sampling.candidates,
        member_logprobs=sampling.member_logprobs,
    )


def _sample_numpy(logits: F32, row_terms: Sequence[Terms], samples: Sequence[SampleRow]) -> StepOutput:
    output = empty_output(len(samples))
    for index, (terms, sample) in enumerate(zip(row_terms, samples, strict=True)):
        if is_single(terms):
            mixed: Row = logits[terms[0][0]]
        else:
            mixed = mix(logits[[row for row, _ in terms]], [c for _, c in terms], sample.space)
        token_id = _draw(mixed, sample)
        if isinstance(token_id, str):
            output.errors[index] = token_id
            continue
        output.token_ids[index] = token_id
        if sample.sampling.logprobs is not None:
            logprobs = _log_softmax(mixed)
            output.logprobs[index] = logprobs[token_id]
            output.top_logprobs[index] = _top(logprobs, sample.sampling.logprobs)
            output.candidate_logprobs[index] = logprobs[list(sample.sampling.candidates)].tolist()
        if sample.sampling.member_logprobs:
            output.member_logprobs[index] = [float(_log_softmax(logits[row])[token_id]) for row, _ in terms]
    return output


@np.errstate(over="ignore", invalid="ignore")  # what overflows is infinite or NaN, and is told apart here
def _draw(mixed: Row, sample: SampleRow) -> int | str:
    """The token, or the reason why there is none."""
    sampling = sample.sampling
    adjusted: Row = mixed if sample.edits.is_empty else apply_edits(mixed.astype(np.float64), sample.edits)
    best = int(np.argmax(adjusted))
    if not max(mixed.max(), adjusted[best]) < np.inf:  # numpy's max of a row with NaN is NaN
        return _NOT_FINITE
    if adjusted[best] == -np.inf:
        return _NOTHING_LEFT
    if is_greedy(adjusted[best], sampling.temperature):
        return best
    tempered = adjusted.astype(np.float64) / sampling.temperature
    if sampling.truncation:
        tempered = np.where(truncate(tempered, **sampling.truncation), tempered, -np.inf)
    return _gumbel_argmax(tempered, sample)


def _gumbel_argmax(tempered: npt.NDArray[np.float64], sample: SampleRow) -> int:
    """argmax of tempered + noise. Noise is drawn for the best few tokens first, then for all that can still win."""
    count, seed = min(_FIRST_DRAWN, len(tempered)), sample.sampling.seed
    first = np.argpartition(tempered, len(tempered) - count)[-count:]
    score = tempered[first] + gumbel(first, sample.position, seed)
    candidates = np.flatnonzero(tempered + LARGEST_GUMBEL >= score.max())  # ascending, so that ties take the lowest id
    scores = tempered[candidates] + gumbel(candidates, sample.position, seed)
    return int(candidates[np.argmax(scores)])


def _log_softmax(logits: Row) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - math.log(float(np.exp(shifted).sum())))


def _top(logprobs: npt.NDArray[np.float64], count: int) -> list[tuple[int, float]]:
    if count == 0:
        return []
    count = min(count, len(logprobs))
    least = np.partition(logprobs, len(logprobs) - count)[-count]
    best = np.flatnonzero(logprobs >= least)  # more than `count` if the last ones are equal
    best = best[np.lexsort((best, -logprobs[best]))][:count]
    return [(int(token_id), float(logprobs[token_id])) for token_id in best]
