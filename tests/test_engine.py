"""The engine over the fake backend: what a request gets does not depend on who else is there."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from motet.runtime import errors
from motet.runtime.config import EngineConfig
from motet.runtime.engine import Engine, ModelInfo
from motet.runtime.request import Ensemble, FinishReason, Member, Request, SamplingParams, Space

_spec = importlib.util.spec_from_file_location("fake_backend", Path(__file__).parent / "fake_backend.py")
fake_backend = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_backend)

SOLO = Ensemble((Member("a", 1.0),))


def make_engine(tokenizer, *, num_blocks=32, block_size=8, **config) -> Engine:
    values = {"max_num_seqs": 8, "max_model_len": 96, "max_num_batched_tokens": 16, "prefill_chunk": 8} | config
    model = ModelInfo("fake", ("a", "b", "c"), SOLO, (255,), 256, values["max_model_len"])
    return Engine(fake_backend.FakeBackend(num_blocks, block_size), tokenizer, model, EngineConfig(**values))


def ask(name, prompt=(1, 2, 3), *, views=(), ensemble=SOLO, time_limit_s=None, **params) -> Request:
    params = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params
    return Request(name, (tuple(prompt), *views), ensemble, SamplingParams(**params), time_limit_s)


@st.composite
def requests(draw):
    """Requests with views of different lengths, ensembles, sampling, several choices."""
    result = []
    for index in range(draw(st.integers(1, 6))):
        rng = np.random.default_rng(draw(st.integers(0, 10_000)))
        lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=2))
        prompts = [tuple(int(t) for t in rng.integers(0, 255, n)) for n in lengths]
        mix = [Member("a", 0.7), Member("b", 0.3, len(prompts) - 1)]
        space = draw(st.sampled_from(list(Space)))
        params = SamplingParams(
            max_tokens=draw(st.integers(1, 20)),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=draw(st.integers(0, 2**64 - 1)),
            ignore_eos=True,
            n=draw(st.integers(1, 2)),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        )
        result.append(Request(f"r{index}", tuple(prompts), Ensemble(tuple(mix), space), params))
    return result


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests(), st.integers(14, 40))
def test_solo_is_batched_is_preempted(tokenizer, batch, num_blocks):
    """The same tokens alone with ample blocks, and together with so few that groups are preempted and recomputed."""
    with make_engine(tokenizer, num_blocks=200) as engine:
        alone = [engine.complete([request])[0] for request in batch]
    with make_engine(tokenizer, num_blocks=num_blocks) as engine:
        together = engine.complete(batch)
        assert engine.stats().free_blocks == num_blocks
    assert [[c.token_ids for c in choices] for choices in alone] == [
        [c.token_ids for c in choices] for choices in together
    ]


def test_preemption_happens(tokenizer):
    with make_engine(tokenizer, num_blocks=9) as engine:
        batch = [ask(f"r{i}", [i] * 20, max_tokens=30) for i in range(3)]
        results = engine.complete(batch)
        rows, samples = (sum(column) for column in zip(*engine._backend.batches))
    assert all(len(choices[0].token_ids) == 30 for choices in results)
    assert samples == 90
    assert rows > 3 * (
        20 + 29
    )  # nine blocks do not hold three groups of fifty positions: some rows were computed twice


def test_choices_differ_and_repeat(tokenizer):
    with make_engine(tokenizer) as engine:
        first = engine.complete([ask("x", temperature=1.0, seed=5, n=3)])[0]
        again = engine.complete([ask("y", temperature=1.0, seed=5, n=3)])[0]
        single = engine.complete([ask("z", temperature=1.0, seed=5)])[0]
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert first[0].token_ids == single[0].token_ids
    assert len({tuple(c.token_ids) for c in first}) == 3


def test_cancel_frees_all_blocks_at_any_time(tokenizer):
    with make_engine(tokenizer, num_blocks=40) as engine:
        ended = {}
        done = threading.Semaphore(0)

        def on_output(output):
            if output.finish_reason is not None:
                ended[output.request_id] = output.finish_reason
                done.release()

        for index in range(20):
            engine.submit(ask(f"r{index}", [index] * 9, max_tokens=80), on_output)
            if index % 2:
                engine.abort(f"r{index}")
        for _ in range(20):
            assert done.acquire(timeout=30)
        assert engine.stats().free_blocks == 40
    assert all(ended[f"r{i}"] is (FinishReason.CANCELLED if i % 2 else FinishReason.LENGTH) for i in range(20))


def test_stop_conditions(tokenizer):
    with make_engine(tokenizer) as engine:
        plain = engine.complete([ask("p", max_tokens=20)])[0][0]
        third = plain.token_ids[2]
        by_id = engine.complete([ask("i", max_tokens=20, stop_token_ids=(third,))])[0][0]
        late = engine.complete([ask("l", max_tokens=20, stop_token_ids=(third,), min_tokens=6)])[0][0]
    assert by_id.finish_reason is FinishReason.STOP
    assert by_id.stop_matched == third
    assert by_id.token_ids == plain.token_ids[:3]
    assert third not in late.token_ids[:6]
    assert plain.finish_reason is FinishReason.LENGTH


def test_time_limit_gives_what_there_is(tokenizer):
    with make_engine(tokenizer, max_model_len=4096, num_blocks=1024) as engine:
        result = engine.complete([ask("t", max_tokens=None, time_limit_s=0.05)])[0][0]
    assert result.finish_reason is FinishReason.TIME_LIMIT
    assert 0 < len(result.token_ids) < 4093


def test_nan_ends_that_request_alone(tokenizer):
    with make_engine(tokenizer) as engine:
        engine._backend.nan_seeds = {13}
        results = {}
        done = threading.Semaphore(0)

        def on_output(output):
            if output.finish_reason is not None:
                results[output.request_id] = output
                done.release()

        engine.submit(ask("bad", seed=13), on_output)
        engine.submit(ask("good", seed=1), on_output)
        assert done.acquire(timeout=10)
        assert done.acquire(timeout=10)
    assert isinstance(results["bad"].error, errors.NumericalError)
    assert results["good"].finish_reason is FinishReason.LENGTH


def test_a_failed_step_is_survived(tokenizer):
    with make_engine(tokenizer) as engine:
        engine._backend.fail_next = True
        with pytest.raises(errors.MotetError, match="told to fail"):
            engine.complete([ask("x")])
        assert len(engine.complete([ask("y")])[0][0].token_ids) == 12


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (lambda: ask("x", ensemble=Ensemble((Member("zz", 1.0),))), errors.InvalidEnsembleError, "its members are"),
        (lambda: ask("x", [1] * 96), errors.ContextLengthError, "96 tokens; the context holds 96"),
        (lambda: ask("x", [300]), errors.InvalidRequestError, "token id 300"),
        (lambda: ask("x", logit_bias={999: 1.0}), errors.InvalidRequestError, "999 in logit_bias"),
        (lambda: ask("x", [1] * 60, max_tokens=None), errors.ContextLengthError, "blocks of KV cache"),
    ],
)
def test_bad_requests_are_refused(tokenizer, request_, error, message):
    with make_engine(tokenizer, num_blocks=8) as engine, pytest.raises(error, match=message):
        engine.submit(request_(), lambda output: None)


def test_nobody_waits_for_a_dead_engine(tokenizer, monkeypatch):
    with make_engine(tokenizer) as engine:

        def fail():
            raise AssertionError("a bug")

        monkeypatch.setattr(engine._scheduler, "schedule", fail)
        with pytest.raises(errors.MotetError, match="a bug"):
            engine.complete([ask("x")])
        with pytest.raises(errors.UnavailableError):
            engine.submit(ask("y"), lambda output: None)


def test_overload_and_shutdown(tokenizer):
    engine = make_engine(tokenizer, max_waiting=2)
    with pytest.raises(errors.OverloadedError, match="max_waiting"):
        engine.submit(ask("n", n=3), lambda output: None)
    engine.drain()
    with pytest.raises(errors.UnavailableError):
        engine.submit(ask("x"), lambda output: None)
    engine.close()
