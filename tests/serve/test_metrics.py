"""What Prometheus reads of an engine; over the fake backend."""

from __future__ import annotations

import pytest
from helpers.fake_backend import FakeBackend, ask, gather, make_engine
from motet.runtime import errors
from motet.runtime.serve.metrics import engine_registry


def test_counters_are_the_engine_s(tokenizer):
    with make_engine(tokenizer) as engine:
        registry = engine_registry(engine)
        engine.complete([ask("x", range(20), n=2)])
        engine.complete([ask("y", range(20))])
        stats = engine.stats()
        found = {
            name: registry.get_sample_value(f"motet_{name}")
            for name in ("waiting_choices", "running_choices", "free_blocks", "blocks", "steps_total", "tokens_total")
        }
        cached, prompt = (registry.get_sample_value(f"motet_{name}_tokens_total") for name in ("cached", "prompt"))
    assert found == {
        "waiting_choices": 0,
        "running_choices": 0,
        "free_blocks": 32,
        "blocks": 32,
        "steps_total": stats.steps,
        "tokens_total": 36,
    }
    assert (cached, prompt) == (32, 60)


def test_ends_and_refusals_are_counted_by_reason(tokenizer):
    backend = FakeBackend()
    backend.nan_seeds = {13}
    with make_engine(tokenizer, backend) as engine:
        registry = engine_registry(engine)
        gather(engine, [ask("two", n=2), ask("bad", seed=13), ask("late", time_limit_s=1e-9)])
        for _ in range(2):
            with pytest.raises(errors.InvalidRequestError):
                engine.submit(ask("x", [300]), lambda output: None)
        steps = engine.stats().steps
    ends = {
        reason: registry.get_sample_value("motet_finished_choices_total", {"reason": reason})
        for reason in ("stop", "length", "cancelled", "time_limit", "error")
    }
    assert ends == {"stop": 0, "length": 2, "cancelled": 0, "time_limit": 1, "error": 1}
    refused = registry.get_sample_value("motet_rejected_requests_total", {"error": "InvalidRequestError"})
    assert refused == 2
    assert registry.get_sample_value("motet_step_seconds_count") == steps
    assert registry.get_sample_value("motet_first_token_seconds_count") == 2  # the others have no token
    assert registry.get_sample_value("motet_queue_seconds_count") == 2
