"""What the engine takes and what it refuses, and why; over the fake backend."""

from __future__ import annotations

import pytest
from helpers.fake_backend import FakeBackend, ask, hold_first_step, make_engine, start
from motet.runtime import errors
from motet.runtime.api.request import Ensemble, FinishReason, Member

BOTH_VIEWS = Ensemble((Member("a", 1.5), Member("a", -0.5, 1)))
SECOND_VIEW = Ensemble((Member("a", 1.0, 1),))
NINE_VIEWS = Ensemble(tuple(Member("a", 1 / 9, view) for view in range(9)))


def test_complete_refuses_before_it_starts(tokenizer):
    with make_engine(tokenizer) as engine:
        with pytest.raises(errors.InvalidRequestError, match="token id 300"):
            engine.complete([ask("good"), ask("bad", [300])])
        assert engine.stats().steps == 0


def test_complete_does_not_wait_for_room_there_can_never_be(tokenizer):
    with make_engine(tokenizer, max_waiting=2) as engine, pytest.raises(errors.InvalidRequestError, match="n is 3"):
        engine.complete([ask("x", n=3)])


def test_more_requests_than_the_queue_takes(tokenizer):
    with make_engine(tokenizer, max_waiting=3) as engine:
        results = engine.complete([ask(f"r{index}", [index], n=2) for index in range(8)])
    assert [[c.choice for c in choices] for choices in results] == [[0, 1]] * 8


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (lambda: ask("x", ensemble=Ensemble((Member("zz", 1.0),))), errors.InvalidEnsembleError, "its members are"),
        (lambda: ask("x", [1] * 96), errors.ContextLengthError, "96 tokens; the context holds 96"),
        (lambda: ask("x", [300]), errors.InvalidRequestError, "token id 300"),
        (lambda: ask("x", [-1], views=([1],), ensemble=SECOND_VIEW), errors.InvalidRequestError, "token id -1"),
        (lambda: ask("x", logit_bias={999: 1.0}), errors.InvalidRequestError, "999 in logit_bias"),
        (lambda: ask("x", [1] * 60, max_tokens=None), errors.ContextLengthError, "blocks of KV cache"),
        (lambda: ask("x", stop_token_ids=(256,)), errors.InvalidRequestError, "256 in stop_token_ids"),
        (lambda: ask("x", cache_salt="tenant"), errors.InvalidRequestError, "cache_salt must be bytes, got 'tenant'"),
        (lambda: ask("x", n=33), errors.InvalidRequestError, r"n is 33; .* max_waiting \(32\)"),
        (lambda: ask("x", views=[(i,) for i in range(9)], ensemble=NINE_VIEWS), errors.InvalidRequestError, "9 views"),
        (lambda: ask("x", views=[(1,) * 97], ensemble=SECOND_VIEW), errors.ContextLengthError, "97 tokens"),
    ],
)
def test_bad_requests_are_refused(tokenizer, request_, error, message):
    with make_engine(tokenizer, FakeBackend(8), max_waiting=32) as engine, pytest.raises(error, match=message):
        engine.submit(request_(), lambda output: None)


def test_what_just_fits_is_taken(tokenizer):
    """Views of 60 and 4 tokens leave 36 for the answer: 12 and 5 blocks, not 12 and 12."""
    with make_engine(tokenizer, FakeBackend(17)) as engine:
        result = engine.complete([ask("x", [1] * 60, views=[(2,) * 4], ensemble=BOTH_VIEWS, max_tokens=None)])[0][0]
    assert len(result.token_ids) == 36
    assert result.finish_reason is FinishReason.LENGTH


def test_a_full_queue_is_overload(tokenizer):
    backend = FakeBackend()
    held, go = hold_first_step(backend)
    with make_engine(tokenizer, backend, max_waiting=2, max_num_seqs=1) as engine:
        wait = start(engine, [ask("running")])
        assert held.wait(timeout=30)
        wait_too = start(engine, [ask("waiting", n=2)])
        assert (engine.stats().running, engine.stats().waiting) == (1, 2)
        with pytest.raises(errors.OverloadedError, match="2 choices are waiting"):
            engine.submit(ask("too many"), lambda output: None)
        go.set()
        wait()
        assert {output.finish_reason for output in wait_too().values()} == {FinishReason.LENGTH}
        assert engine.stats().waiting == 0


def test_the_queue_is_bounded_in_tokens_too(tokenizer):
    backend = FakeBackend()
    held, go = hold_first_step(backend)
    with make_engine(tokenizer, backend, max_waiting_tokens=40, max_num_seqs=1) as engine:
        wait = start(engine, [ask("running")])
        assert held.wait(timeout=30)
        wait_too = start(engine, [ask("waiting", [5] * 50)])  # alone it may be larger
        with pytest.raises(
            errors.OverloadedError, match=r"50 tokens are waiting and 3 more exceed max_waiting_tokens \(40\)"
        ):
            engine.submit(ask("too many", [5] * 3), lambda output: None)
        go.set()
        wait()
        wait_too()
        assert len(engine.complete([ask("later", [5] * 3)])[0][0].token_ids) == 12


def test_drain_ends_what_is_here_and_takes_no_more(tokenizer):
    backend = FakeBackend()
    held, go = hold_first_step(backend)
    with make_engine(tokenizer, backend) as engine:
        wait = start(engine, [ask("x")])
        assert held.wait(timeout=30)
        engine.drain()
        with pytest.raises(errors.UnavailableError):
            engine.submit(ask("y"), lambda output: None)
        go.set()
        assert len(wait()["x", 0].token_ids) == 12
