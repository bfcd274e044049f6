"""What observers are told, and that they cannot disturb the engine; over the fake backend."""

from __future__ import annotations

import logging

import pytest
from helpers.fake_backend import FakeBackend, ask, gather, make_engine
from motet.runtime import errors
from motet.runtime.api.request import FinishReason
from motet.runtime.engine.observer import Observer


class Recorder(Observer):
    def __init__(self):
        self.steps, self.finished, self.rejected = [], [], []

    def on_step(self, step):
        self.steps.append(step)

    def on_finish(self, request, last):
        self.finished.append((request, last))

    def on_reject(self, request, error):
        self.rejected.append((request, error))


class Broken(Observer):
    def on_step(self, step):
        raise RuntimeError("no step")

    def on_finish(self, request, last):
        raise RuntimeError("no finish")

    def on_reject(self, request, error):
        raise RuntimeError("no reject")


class OnlyRejections(Observer):
    def __init__(self):
        self.errors = []

    def on_reject(self, request, error):
        self.errors.append(error)


def test_every_step_is_reported_before_the_client_has_its_tokens(tokenizer):
    recorder, counts = Recorder(), []
    with make_engine(tokenizer, observers=[recorder]) as engine:
        result = engine.complete([ask("x", range(10))], on_output=lambda delta: counts.append(len(recorder.steps)))
        stats = engine.stats()
    assert [step.batch.num_rows for step in recorder.steps] == [8, 1, *[1] * 12]  # two chunks, then a token a step
    assert counts == list(range(3, 15))
    assert stats.steps == 14
    tokens = [token for step in recorder.steps for token in step.output.token_ids.tolist()]
    assert tokens == result[0][0].token_ids
    assert all(step.seconds >= 0 and step.parts == {"all": 0.25} for step in recorder.steps)


def test_every_end_is_reported_once_with_its_reason(tokenizer):
    backend, recorder = FakeBackend(), Recorder()
    backend.nan_seeds = {13}
    batch = [ask("two", n=2), ask("bad", seed=13), ask("late", max_tokens=90, time_limit_s=1e-9)]
    with make_engine(tokenizer, backend, observers=[recorder]) as engine:
        outputs = gather(engine, batch)
    found = {(request.request_id, last.choice): last for request, last in recorder.finished}
    assert len(recorder.finished) == len(found) == 4
    assert {key: last.finish_reason for key, last in found.items()} == {
        ("two", 0): FinishReason.LENGTH,
        ("two", 1): FinishReason.LENGTH,
        ("bad", 0): FinishReason.ERROR,
        ("late", 0): FinishReason.TIME_LIMIT,
    }
    assert isinstance(found["bad", 0].error, errors.NumericalError)
    assert all(last.usage == outputs[key].usage and last.timings is not None for key, last in found.items())


def test_what_submit_raises_is_reported(tokenizer):
    recorder = Recorder()
    with make_engine(tokenizer, observers=[recorder]) as engine:
        with pytest.raises(errors.InvalidRequestError):
            engine.submit(ask("x", [300]), lambda output: None)
        engine.drain()
        with pytest.raises(errors.UnavailableError):
            engine.submit(ask("y"), lambda output: None)
    assert [(request.request_id, type(error)) for request, error in recorder.rejected] == [
        ("x", errors.InvalidRequestError),
        ("y", errors.UnavailableError),
    ]


def test_a_failed_step_is_no_step_and_ends_its_requests(tokenizer):
    backend, recorder = FakeBackend(), Recorder()
    backend.fail_next = True
    with make_engine(tokenizer, backend, observers=[recorder]) as engine:
        gather(engine, [ask("x")])
    assert recorder.steps == []
    assert [last.finish_reason for _, last in recorder.finished] == [FinishReason.ERROR]


def test_an_observer_that_fails_is_logged_and_disturbs_neither_engine_nor_others(tokenizer, caplog):
    recorder = Recorder()
    with caplog.at_level(logging.ERROR), make_engine(tokenizer, observers=[Broken(), recorder]) as engine:
        assert len(engine.complete([ask("x")])[0][0].token_ids) == 12
        with pytest.raises(errors.InvalidRequestError):
            engine.submit(ask("y", [300]), lambda output: None)
    assert len(recorder.steps) == 13
    assert (len(recorder.finished), len(recorder.rejected)) == (1, 1)
    assert {str(record.exc_info[1]) for record in caplog.records} == {"no step", "no finish", "no reject"}


def test_later_subscribers_hear_what_comes_then(tokenizer):
    late = Recorder()
    with make_engine(tokenizer, observers=[OnlyRejections()]) as engine:
        engine.complete([ask("x")])
        engine.subscribe(late)
        engine.complete([ask("y")])
    assert [request.request_id for request, _ in late.finished] == ["y"]
