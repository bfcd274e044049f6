"""Drafts: what is guessed and when it pays, and the rows and blocks of a draft in a step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.samples import edits_of
from hypothesis import given
from hypothesis import strategies as st
from motet.runtime.api.request import FinishReason, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.schedule.batch import StepOutput
from motet.runtime.schedule.blocks import BlockManager
from motet.runtime.schedule.drafts import MARGIN, ROW_COST, Drafter, StepLoad
from motet.runtime.schedule.resolve import LogitEditor
from motet.runtime.schedule.scheduler import Scheduler
from motet.runtime.schedule.sequence import Group, Sequence

ALONE = StepLoad(1, 1.0)


# ---- guesses ---------------------------------------------------------------------------------------------------------


def shown(text, prompt=1, max_tokens=8) -> Drafter:
    """A drafter that was shown the text token by token, from the end of the prompt on."""
    drafter = Drafter(max_tokens)
    for end in range(prompt + 1, len(text) + 1):
        drafter.observe(np.array(text[:end]))
    return drafter


def propose(text, limit=8, load=ALONE, num_sequences=1, **kwargs):
    load = StepLoad(load.rows, load.tokens)
    return shown(text, **kwargs).propose(np.array(text), limit, load, num_sequences).tolist()


def test_a_draft_is_what_followed_before():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    assert propose(text, 2) == [4, 5]
    assert propose(text[:-2]) == []
    assert propose([1, 2], 2) == []
    assert propose([1, 2, 1], 2) == []


def test_the_latest_occurrence_counts():
    assert propose([1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3], 1) == [5]


def test_a_guess_moves_along():
    """Once found, the place is followed: 5 goes on with 6 as in the place that was found, though 4 5 6 is not newest."""
    text = [1, 2, 3, 4, 5, 6, 8, 8, 1, 2, 3, 4, 5]
    assert propose(text, 1) == [6]
    assert propose([*text, 7], 1) == []  # it did not go on as guessed, and 4 5 7 is new


def test_what_repeats_itself_goes_on():
    assert propose([9, *[1, 2, 3] * 4, 1], 5) == [2, 3, 1, 2, 3]
    assert set(propose([7] * 20, 8)) == {7}


@given(st.lists(st.integers(0, 3), min_size=3, max_size=40), st.integers(1, 40))
def test_a_prompt_at_once_or_token_by_token(text, prompt):
    """The index of a prompt, made at once, holds what showing each token would have put there."""
    prompt = min(prompt, len(text) - 1)
    assert shown(text, prompt)._ends == shown(text)._ends
    assert shown(text)._ends == {(a << 32) | b: index + 2 for index, (a, b) in enumerate(itertools.pairwise(text))}


def test_the_longer_it_was_right_the_longer_the_draft():
    source = list(range(100, 140))
    sizes = [len(propose([*source, 1, *source[:copied]], 16)) for copied in (3, 5, 9, 20)]
    assert sizes == sorted(sizes)
    assert 1 <= sizes[0] < sizes[-1]


def test_wrong_guesses_end_drafting_and_right_ones_begin_it_again():
    """A guess is compared with what was drawn whether or not it was drafted, so nothing has to be tried."""
    text, sizes = list(range(10)), []
    for turn in range(30):
        text += [0, 1, 2]
        sizes.append(len(propose(text, 4, prompt=9)))
        text.append(50 + turn)
    assert sizes[0] > 0
    assert sizes[-10:] == [0] * 10
    assert propose([*text, *range(8), *range(8), *range(8), *range(8)], 4, prompt=9)


def test_the_price_of_a_row():
    """Alone, a row costs a share of the step; among sixteen it costs nearly what it yields."""
    assert ALONE.price(1) == MARGIN * ROW_COST
    assert ALONE.price(2) == 2 * ALONE.price(1)
    assert StepLoad(16, 16.0).price(1) > 0.75
    assert StepLoad(4, 4.0).price(1) < StepLoad(16, 16.0).price(1)


def test_what_is_drafted_loads_the_step():
    text = [*range(20), *range(12)]
    load = StepLoad(2, 1.0)
    size = len(shown(text).propose(np.array(text), 4, load, 2))
    assert load.rows == 2 + 2 * size
    assert 1 < load.tokens < 1 + size


# ---- rows of the scheduler -------------------------------------------------------------------------------------------

SOURCE = tuple(range(100, 130))
PROMPT = (*SOURCE, 1, *SOURCE[:12])  # its last tokens stand in it before: what follows can be guessed


def make_group(*prompts, max_tokens=99, stop_id=0, confident=True, **params) -> Group:
    sequences = [Sequence(tuple(prompt), (0,)) for prompt in prompts]
    terms = tuple((index, 0, 1 / len(prompts)) for index in range(len(prompts)))
    drafter = Drafter(4)
    if confident:
        drafter._chances = [0.99] * 3
    sampling = SamplingParams(**params)
    return Group(
        "x",
        0,
        sequences,
        terms,
        Space.LOGITS,
        sampling,
        7,
        max_tokens,
        frozenset({stop_id}),
        LogitEditor(sampling, {stop_id}, prompts[0]),
        drafter=drafter,
    )


def edits_by_token(edits):
    columns = (edits.ids, edits.divisors, edits.penalties, edits.biases)
    return {token: tuple(values) for token, *values in zip(*(column.tolist() for column in columns))}


def make_scheduler(num_blocks=64, block_size=4, max_rows=64) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), 8, max_rows, 64)


def answer(batch, tokens, errors=None) -> StepOutput:
    token_ids = np.array(tokens, np.int64)
    assert len(token_ids) == len(batch.samples)
    return StepOutput(token_ids, np.zeros(len(tokens), np.float32), [], [], [], errors or {})


def stop_token(group, token_id):
    """An answer ends at a stop token."""
    return FinishReason.STOP if token_id in group.stop_ids else None


def commit(scheduler, scheduled, tokens, errors=None):
    return scheduler.commit(scheduled, answer(scheduled.batch, tokens, errors), stop_token)


def drafted(*prompts, scheduler=None, **params):
    """(scheduler, group, batch with its first draft): 112 was drawn after the prompt, as guessed."""
    scheduler, group = scheduler or make_scheduler(), make_group(*prompts or [PROMPT], **params)
    scheduler.add(group)
    while not (scheduled := scheduler.schedule()).batch.samples:
        commit(scheduler, scheduled, [])
    commit(scheduler, scheduled, [112])
    return scheduler, group, scheduler.schedule()


def test_rows_of_a_draft():
    _, group, scheduled = drafted((5, 6), PROMPT, min_tokens=3)
    # The text of the first sequence is the one that is looked up; here it has nothing to find.
    assert scheduled.batch.num_rows == 2
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": 0.5}
    _, group, scheduled = drafted(PROMPT, (5, 6), min_tokens=3, **penalties)
    batch = scheduled.batch
    size = len(batch.samples) - 1
    assert size == 4
    assert batch.num_rows == 2 * (size + 1)
    assert batch.token_ids.tolist() == list(range(112, 113 + size)) * 2
    assert batch.positions.tolist() == [*range(43, 44 + size), *range(2, 3 + size)]
    assert batch.context_lens.tolist() == [44 + size, 3 + size]
    for ahead, sample in enumerate(batch.samples):
        assert sample.terms == ((ahead, 0, 0.5), (size + 1 + ahead, 0, 0.5))
        assert sample.position == 44 + ahead
        expected = edits_of(PROMPT, range(112, 113 + ahead), {0} if ahead < 2 else (), **penalties)
        assert edits_by_token(sample.edits) == edits_by_token(expected)
    assert all(len(s.block_table) * 4 >= len(s.tokens) + size for s in group.sequences)


@pytest.mark.parametrize("right", range(5))
def test_what_is_right_is_kept_and_the_rest_dropped(right):
    scheduler, group, scheduled = drafted()
    size = len(scheduled.batch.samples) - 1
    right = min(right, size)
    tokens = [113 + i for i in range(right)] + [55] * (size + 1 - right)
    (run,) = commit(scheduler, scheduled, tokens)
    assert (run.count, run.reason, run.error) == (right + 1, None, None)
    assert group.output.array().tolist() == [112, *range(113, 113 + right), 55]
    assert group.sequences[0].num_computed == len(group.sequences[0].tokens) - 1
    assert (scheduler.counts["drafted"], scheduler.counts["accepted"]) == (size, right)
    scheduler.check_integrity()
    following = scheduler.schedule().batch
    assert following.positions[0] == 44 + right
    assert following.token_ids[0] == 55
    scheduler.abort(group)
    scheduler.check_integrity()
    assert scheduler.blocks.num_free == 64


def test_a_run_ends_at_a_stop_token_and_at_an_error():
    scheduler, group, scheduled = drafted(stop_id=114)  # it is in the draft, which is right to its end
    size = len(scheduled.batch.samples) - 1
    (run,) = commit(scheduler, scheduled, range(113, 114 + size))
    assert (run.count, run.reason, group.output.array().tolist()) == (2, FinishReason.STOP, [112, 113, 114])
    scheduler, group, scheduled = drafted()
    (run,) = commit(scheduler, scheduled, [113, 9, *[9] * (size - 1)], {1: "NaN"})
    assert (run.count, run.error) == (1, "NaN")
    for stop_id in (0, 8):  # an error in a row that is not reached is none
        scheduler, group, scheduled = drafted(stop_id=stop_id)
        (run,) = commit(scheduler, scheduled, [8, 9, *[9] * (size - 1)], {1: "NaN"})
        assert (run.count, run.error) == (1, None)


def test_a_draft_takes_what_others_leave():
    """Rows, blocks and the rest of max_tokens bound it."""
    assert len(drafted(scheduler=make_scheduler(max_rows=3))[2].batch.samples) == 3
    assert len(drafted(scheduler=make_scheduler(max_rows=1))[2].batch.samples) == 1
    assert len(drafted(max_tokens=2)[2].batch.samples) == 1
    assert len(drafted(max_tokens=3)[2].batch.samples) == 2
    _, group, scheduled = drafted(scheduler=make_scheduler(num_blocks=11))  # 44 positions: the last token's is the last
    assert (len(scheduled.batch.samples), group.num_preemptions) == (1, 0)


def test_in_a_full_step_only_what_is_nearly_sure_is_drafted():
    scheduler = Scheduler(BlockManager(400, 4), 16, 512, 64)
    for _ in range(16):
        scheduler.add(make_group(PROMPT, confident=False))
    while len((scheduled := scheduler.schedule()).batch.samples) < 16:
        commit(scheduler, scheduled, [112] * len(scheduled.batch.samples))
    commit(scheduler, scheduled, [112] * 16)
    assert len(scheduler.schedule().batch.samples) == 16
