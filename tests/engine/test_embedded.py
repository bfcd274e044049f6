"""Rows that are given as embeddings, over the fake backend: whose they are decides what is shared, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.fake_backend import FakeBackend, ask, gather, make_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from motet.runtime.api.embedded import EmbeddedSpan
from motet.runtime.errors import InvalidRequestError

HOLE = 9  # the placeholder's id


def span(start, count, seed, digest=None):
    rows = np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)
    return EmbeddedSpan(start, rows, bytes([seed]) if digest is None else digest)


def with_spans(name, length, spans, **options):
    prompt = np.arange(length) % 50 + 100
    for one in spans:
        prompt[one.start : one.end] = HOLE
    return ask(name, tuple(prompt.tolist()), embedded=(tuple(spans),), **options)


def answers(engine, requests):
    return [one[0].token_ids for one in engine.complete(requests)]


@st.composite
def requests(draw):
    found = []
    for index in range(draw(st.integers(1, 6))):
        length, spans, at = draw(st.integers(2, 40)), [], 0
        for _ in range(draw(st.integers(0, 3))):
            at += draw(st.integers(0, 6))
            count = draw(st.integers(1, 12))
            if at + count <= length:
                spans.append(span(at, count, draw(st.integers(0, 2))))
            at += count
        found.append(with_spans(f"r{index}", length, spans, max_tokens=draw(st.integers(1, 12))))
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests(), st.integers(8, 40), st.booleans(), st.booleans(), st.sampled_from([1, 3, 8]))
def test_solo_is_batched_is_preempted(tokenizer, batch, num_blocks, sample_prefill, keeps_trunk, chunk):
    """The same tokens alone, together with few blocks, in chunks that cut spans, and once more from the cache."""
    with make_engine(tokenizer, FakeBackend(200), prefix_cache=False) as engine:
        alone = [answers(engine, [request])[0] for request in batch]
    backend = FakeBackend(num_blocks, can_sample_prefill=sample_prefill, keeps_trunk=keeps_trunk)
    with make_engine(tokenizer, backend, prefill_chunk=chunk) as engine:
        assert answers(engine, batch) == alone
        assert answers(engine, batch) == alone
        engine._scheduler.check_integrity()
        assert engine.stats().free_blocks == num_blocks


def test_the_rows_reach_the_backend_where_they_belong(tokenizer):
    seen, backend = {}, FakeBackend(64)

    def on_step(batch):
        if batch.embedded is not None:
            assert (batch.token_ids[batch.embedded.rows] == HOLE).all()
            seen.update(zip(batch.positions[batch.embedded.rows].tolist(), batch.embedded.values))

    backend.on_step = on_step
    spans = [span(3, 14, 1), span(17, 2, 2), span(30, 10, 3)]
    with make_engine(tokenizer, backend) as engine:
        answers(engine, [with_spans("x", 40, spans)])
    expected = {one.start + index: row for one in spans for index, row in enumerate(one.rows)}
    assert seen.keys() == expected.keys()
    assert all(np.array_equal(seen[position], row) for position, row in expected.items())


def test_prompts_share_blocks_up_to_the_first_other_row(tokenizer):
    """The tokens are the same, so only what was embedded tells them apart: from its first block on, all are others."""
    backend = FakeBackend(64)
    with make_engine(tokenizer, backend) as engine:
        size = backend.block_size

        def cached(spans):
            [whole] = gather(engine, [with_spans("x", 60, spans, max_tokens=1)]).values()
            return whole.usage.cached_tokens

        assert cached([span(20, 9, 1)]) == 0
        assert cached([span(20, 9, 1)]) == 56, "the same rows"
        assert cached([span(20, 9, 2)]) == 20 // size * size == 16, "others"
        assert cached([span(20, 9, 1), span(50, 3, 2)]) == 50 // size * size == 48, "the same, then others"
        assert cached([span(20, 9, 1, digest=b"other")]) == 16, "other content with the same rows"
        assert cached([span(21, 9, 1)]) == 16, "the same a position later"
        assert cached([]) == 16, "tokens"


def test_the_same_rows_in_other_spans_are_other_content(tokenizer):
    with make_engine(tokenizer, FakeBackend(64)) as engine:
        whole = span(8, 16, 1)
        halves = [EmbeddedSpan(8, whole.rows[:8], b"a"), EmbeddedSpan(16, whole.rows[8:], b"b")]
        first = answers(engine, [with_spans("x", 30, [whole])])
        assert answers(engine, [with_spans("x", 30, halves)]) == first


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([span(30, 20, 1)], "not in the prompt of 40 tokens"),
        ([span(5, 5, 1), span(9, 3, 2)], "overlap others"),
        ([span(9, 3, 1), span(2, 3, 2)], "overlap others"),
    ],
)
def test_spans_that_do_not_fit_the_prompt_are_refused(spans, message):
    with pytest.raises(InvalidRequestError, match=message):
        ask("x", tuple([HOLE] * 40), embedded=(tuple(spans),))
    with pytest.raises(InvalidRequestError, match="spans of 2 prompts"):
        ask("x", tuple([HOLE] * 40), embedded=((), ()))


ROWS = np.ones((2, 4), np.float32)


@pytest.mark.parametrize(
    ("start", "rows", "digest", "message"),
    [
        (-1, ROWS, b"d", "start must be a position.*-1"),
        (True, ROWS, b"d", "start must be a position"),
        (np.float32(1), ROWS, b"d", "start must be a position"),
        (1, ROWS.tolist(), b"d", r"rows must be float32 \[positions, hidden\]"),
        (1, ROWS[0], b"d", r"got float32 of shape \(4,\)"),
        (1, ROWS[:0], b"d", r"one position at least, got float32 of shape \(0, 4\)"),
        (1, ROWS.astype(np.float64), b"d", "got float64"),
        (1, ROWS * np.float32(np.nan), b"d", "NaN or infinite"),
        (1, ROWS * np.float32(np.inf), b"d", "NaN or infinite"),
        (1, ROWS, b"", "digest must be bytes"),
        (1, ROWS, "d", "digest must be bytes"),
    ],
)
def test_a_span_that_is_none_is_refused_when_it_is_made(start, rows, digest, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        EmbeddedSpan(start, rows, digest)
    assert caught.value.field == "embedded"


def test_what_is_no_span_is_refused():
    for spans in (None, [span(1, 2, 1)], (ROWS,)):
        with pytest.raises(InvalidRequestError, match="a tuple of EmbeddedSpan"):
            ask("x", tuple([HOLE] * 40), embedded=(spans,))


def test_rows_of_another_width_are_refused_and_end_nobody_else_s_request(tokenizer):
    narrow = EmbeddedSpan(3, np.ones((4, 3), np.float32), b"d")
    with make_engine(tokenizer, FakeBackend()) as engine:
        with pytest.raises(InvalidRequestError, match=r"have 3 values, 'fake' takes 4 \(hidden_size\)"):
            engine.submit(with_spans("narrow", 20, [narrow]), lambda output: None)
        assert len(answers(engine, [with_spans("x", 20, [span(3, 4, 1)])])[0]) == 12


def test_what_cannot_be_is_refused(tokenizer):
    backend = FakeBackend()
    request = with_spans("x", 20, [span(3, 4, 1)])
    with make_engine(tokenizer, backend) as engine:
        with pytest.raises(InvalidRequestError, match="prompt_logprobs are of tokens"):
            engine.complete([with_spans("x", 20, [span(3, 4, 1)], prompt_logprobs=1)])
        assert len(answers(engine, [request])[0]) == 12
    backend = FakeBackend()
    backend.takes_embedded = False
    with make_engine(tokenizer, backend) as engine, pytest.raises(InvalidRequestError, match="serve with backend cpu"):
        engine.complete([request])
