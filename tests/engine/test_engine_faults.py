"""Faults in the engine over the fake backend: what they end, and what goes on."""

from __future__ import annotations

import pytest
from helpers.fake_backend import FakeBackend, ask, gather, make_engine
from motet.runtime import errors
from motet.runtime.api.request import FinishReason
from motet.runtime.schedule.scheduler import Scheduler


def test_nan_ends_that_request_alone(tokenizer):
    backend = FakeBackend()
    backend.nan_seeds = {13}
    with make_engine(tokenizer, backend) as engine:
        results = gather(engine, [ask("bad", seed=13), ask("good", seed=1)])
    assert results["bad", 0].finish_reason is FinishReason.ERROR
    assert isinstance(results["bad", 0].error, errors.NumericalError)
    assert results["good", 0].finish_reason is FinishReason.LENGTH


def test_a_failed_step_is_survived(tokenizer):
    backend = FakeBackend()
    with make_engine(tokenizer, backend) as engine:
        backend.fail_next = True
        with pytest.raises(errors.MotetError, match="the backend failed"):
            engine.complete([ask("x")])
        assert len(engine.complete([ask("y")])[0][0].token_ids) == 12


def test_a_failed_step_ends_its_requests_only(tokenizer):
    """Three prompts of 20 and 16 rows a step: two chunks fit, the third request is not in the step that fails."""
    batch = [ask(name, [index] * 20) for index, name in enumerate("abc")]
    backend = FakeBackend()
    with make_engine(tokenizer, backend, prefix_cache=False) as engine:
        expected = engine.complete(batch)[2][0].token_ids
        backend.fail_next = True
        results = gather(engine, batch)
        assert engine.stats().free_blocks == 32
    assert [results[name, 0].finish_reason for name in "abc"] == [
        FinishReason.ERROR,
        FinishReason.ERROR,
        FinishReason.LENGTH,
    ]
    assert results["c", 0].token_ids == expected


def test_a_fault_of_the_engine_ends_what_is_there_and_no_more(tokenizer, monkeypatch):
    """The requests of that moment end with an error; the loop starts again and the next ones do not notice."""
    backend = FakeBackend()
    with make_engine(tokenizer, backend) as engine:
        expected = engine.complete([ask("c")])[0][0].token_ids
        engine._scheduler.counts["preempted"] = preempted = 7
        monkeypatch.setattr(engine._scheduler, "commit", lambda scheduled, output, end_of: 1 / 0)
        results = gather(engine, [ask("a"), ask("b", n=2)])
        assert {output.finish_reason for output in results.values()} == {FinishReason.ERROR}
        assert "send the request again" in str(results["b", 1].error)
        assert engine.complete([ask("c")])[0][0].token_ids == expected
        assert engine.failure is None
        assert engine.stats().restarts == 1
        assert engine.stats().preemptions == preempted  # counts go on
        assert engine.stats().free_blocks == 32


def test_an_engine_that_fails_again_and_again_ends(tokenizer, monkeypatch):
    """Nobody waits for ever for an engine that is gone."""
    backend = FakeBackend()
    engine = make_engine(tokenizer, backend)
    monkeypatch.setattr(Scheduler, "commit", lambda self, scheduled, output, end_of: 1 / 0)
    for _ in range(4):
        results = gather(engine, [ask("a")])
        assert results["a", 0].finish_reason is FinishReason.ERROR
    assert "restart the server" in str(results["a", 0].error)
    engine._thread.join(timeout=10)
    with pytest.raises(errors.UnavailableError, match="the engine stopped"):
        engine.submit(ask("c"), lambda output: None)
    assert "the engine stopped" in str(engine.failure)
    engine.close()
    assert backend.closed == 1


def test_a_fault_in_complete_is_raised(tokenizer, monkeypatch):
    with make_engine(tokenizer) as engine:

        def fail():
            raise AssertionError("a bug")

        monkeypatch.setattr(engine._scheduler, "schedule", fail)
        with pytest.raises(errors.MotetError, match="internal error"):
            engine.complete([ask("x")])
        assert len(engine.complete([ask("y")])[0][0].token_ids) == 12


def test_a_callback_that_fails_disturbs_nobody(tokenizer):
    def fail(output):
        raise RuntimeError("no")

    with make_engine(tokenizer) as engine:
        engine.submit(ask("bad"), fail)
        assert len(engine.complete([ask("good")])[0][0].token_ids) == 12
        assert len(engine.complete([ask("also bad")], on_output=fail)[0][0].token_ids) == 12
