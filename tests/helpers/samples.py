"""Rows to sample, from what a user says: for tests of samplers. And what the edits must come to, said a second time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from motet.kernels.oracle.edits import Edits
from motet.runtime.api.request import Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.schedule.batch import SampleRow
from motet.runtime.schedule.resolve import LogitEditor, resolve_sampling


def sample_row(
    terms=(),
    space=Space.LOGITS,
    *,
    seed=7,
    position=3,
    prompt=(),
    output=(),
    forbidden=(),
    mask=None,
    members=False,
    temperatures=(),
    **params,
) -> SampleRow:
    """A row after these tokens; `params` are fields of `SamplingParams`."""
    edits = edits_of(prompt, output, forbidden, mask, **params)
    sampling = resolve_sampling(SamplingParams(**params), seed, members)
    return SampleRow(tuple(terms), space, sampling, position, edits, tuple(temperatures))


def edits_of(prompt=(), output=(), forbidden=(), mask=None, **params) -> Edits:
    """As a group has them after these tokens."""
    params = SamplingParams(**params, min_tokens=len(output) + 1 if len(forbidden) else 0)
    editor = LogitEditor(params, forbidden, [int(token) for token in prompt])
    for token in output:
        editor.observe(int(token))
    return replace(editor.edits(), mask=mask)


def penalise(
    mixed,
    prompt_ids,
    output_ids,
    *,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias=None,
    forbidden=(),
    mask=None,
):
    """The definition, token by token: repetition (prompt and answer: positive logits divided, others multiplied), presence
    and frequency (answer only: subtracted), biases, forbidden tokens and the mask, in this order."""
    adjusted = mixed.copy()
    seen = np.unique(np.concatenate([prompt_ids, output_ids]).astype(np.int64))
    adjusted[seen] = np.where(
        adjusted[seen] > 0, adjusted[seen] / repetition_penalty, adjusted[seen] * repetition_penalty
    )
    ids, counts = np.unique(np.asarray(output_ids, np.int64), return_counts=True)
    adjusted[ids] -= presence_penalty + frequency_penalty * counts
    for token_id, value in (logit_bias or {}).items():
        adjusted[token_id] += value
    adjusted[list(forbidden)] = -np.inf
    if mask is not None:
        adjusted[[token for token in range(len(mixed)) if not int(mask[token // 32]) >> token % 32 & 1]] = -np.inf
    return adjusted
