"""Embeddings between the engine's steps: the same whatever else runs, and nothing is left behind."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from helpers.fake_backend import FakeBackend, ask, make_engine, start
from helpers.servers import until
from motet.runtime.api.request import Ensemble, Member, Owner
from motet.runtime.engine.embedder import EmbedJob
from motet.runtime.errors import (
    ContextLengthError,
    InvalidEnsembleError,
    InvalidRequestError,
    MotetError,
    OverloadedError,
    UnavailableError,
)

MIX = Ensemble((Member("a", 0.25), Member("c", 0.75)))
PROMPTS = [tuple(np.random.default_rng(i).integers(0, 255, 3 + 17 * i).tolist()) for i in range(5)]


def embed(engine, prompts, ensemble=MIX):
    """Results in the order of the prompts."""
    results, done = [None] * len(prompts), threading.Semaphore(0)

    def keeper(index):
        def keep(result):
            results[index] = result
            done.release()

        return keep

    engine.embedder.submit([EmbedJob(prompt, ensemble, keeper(i)) for i, prompt in enumerate(prompts)])
    for _ in prompts:
        assert done.acquire(timeout=20), "an embedding did not come"
    return results


def expected(prompt, ensemble=MIX):
    """From what the fake backend's slots hold after the whole prompt."""
    backend = FakeBackend(200)
    with_states = np.zeros(4)
    for member in ensemble.members:
        index = "abc".index(member.name)
        backend.score(prompt, index)
        held = backend.values[index, : len(prompt)]
        states = np.stack([(held >> shift) % 97 - 48 for shift in (0, 7, 14, 21)], axis=-1)
        with_states = with_states + member.mix * states.mean(axis=0)
        backend = FakeBackend(200)
    return with_states / np.linalg.norm(with_states)


def test_it_is_the_mean_of_the_mixed_states(tokenizer):
    with make_engine(tokenizer, FakeBackend(200)) as engine:
        for prompt, found in zip(PROMPTS, embed(engine, PROMPTS), strict=True):
            np.testing.assert_allclose(found, expected(prompt), atol=1e-6)
        alone = Ensemble((Member("b", 1.0),))
        np.testing.assert_allclose(embed(engine, PROMPTS[:1], alone)[0], expected(PROMPTS[0], alone), atol=1e-6)
        until(lambda: engine.is_idle)
        assert engine.stats().free_blocks == 200


def test_beside_requests_neither_changes(tokenizer):
    """In small pieces, with so few blocks that they wait for each other."""
    requests = [ask(f"r{i}", tuple(range(i, i + 20)), max_tokens=40, temperature=0.9, seed=i) for i in range(6)]
    with make_engine(tokenizer, FakeBackend(200)) as engine:
        alone = {r.request_id: engine.complete([r])[0][0].token_ids for r in requests}
    with make_engine(tokenizer, FakeBackend(20)) as engine:
        wait = start(engine, requests)
        found = [embed(engine, PROMPTS) for _ in range(3)]
        outputs = wait()
        until(lambda: engine.is_idle)
        assert engine.stats().free_blocks == 20
    assert {r: outputs[r, 0].token_ids for r in alone} == alone
    for results in found:
        for prompt, result in zip(PROMPTS, results, strict=True):
            np.testing.assert_allclose(result, expected(prompt), atol=1e-6)


def test_what_is_cancelled_is_dropped(tokenizer):
    backend = FakeBackend(200)
    backend.on_step = lambda _batch: time.sleep(0.01)
    results = []
    with make_engine(tokenizer, backend) as engine:
        jobs = [EmbedJob(tuple(range(80)), MIX, results.append) for _ in range(6)]
        engine.embedder.submit(jobs)
        engine.embedder.cancel(jobs)
        until(lambda: engine.is_idle)
        assert all(isinstance(result, MotetError) for result in results)
        np.testing.assert_allclose(embed(engine, PROMPTS[:1])[0], expected(PROMPTS[0]), atol=1e-6)


def test_a_step_that_fails_ends_its_jobs(tokenizer):
    backend = FakeBackend(200)
    with make_engine(tokenizer, backend) as engine:
        backend.fail_next = True
        assert isinstance(embed(engine, PROMPTS[:1])[0], MotetError)
        np.testing.assert_allclose(embed(engine, PROMPTS[:1])[0], expected(PROMPTS[0]), atol=1e-6)
        assert engine.stats().free_blocks == 200


def test_a_restart_and_the_end_tell_those_who_wait(tokenizer, monkeypatch):
    backend = FakeBackend(200)
    with make_engine(tokenizer, backend) as engine:
        fault = monkeypatch.context()
        with fault as patched:
            patched.setattr(engine.embedder, "_next_rows", lambda _jobs, _room: 1 / 0)
            assert isinstance(embed(engine, PROMPTS[:1])[0], MotetError)
        assert engine.stats().restarts == 1
        np.testing.assert_allclose(embed(engine, PROMPTS[:1])[0], expected(PROMPTS[0]), atol=1e-6)
    with pytest.raises(UnavailableError, match="shutting down"):
        engine.embedder.submit([EmbedJob((1,), MIX, print)])


def test_what_is_refused(tokenizer):
    with make_engine(tokenizer, FakeBackend(200), max_waiting_tokens=100) as engine:
        for prompt, ensemble, error in (
            ((), MIX, InvalidRequestError),
            ((300,), MIX, InvalidRequestError),
            (tuple(range(97)), MIX, ContextLengthError),
            ((1,), Ensemble((Member("z", 1.0),)), InvalidEnsembleError),
        ):
            with pytest.raises(error):
                engine.embedder.submit([EmbedJob(prompt, ensemble, print)])
        engine._backend.on_step = lambda _batch: time.sleep(0.05)
        many = [[EmbedJob(tuple(range(60)), MIX, lambda _result: None)] for _ in range(20)]
        with pytest.raises(OverloadedError, match="max_waiting_tokens"):
            list(map(engine.embedder.submit, many))


BATCH = Owner(is_background=True)


def submit(engine, prompts, owner=None, ended=None):
    """Queue prompts; the list gets the index of each when it has ended."""
    order = [] if ended is None else ended
    jobs = [EmbedJob(p, MIX, lambda _r, i=i: order.append(i), owner or Owner()) for i, p in enumerate(prompts)]
    engine.embedder.submit(jobs)
    return order


def test_batch_work_gives_its_places_to_others(tokenizer):
    """Beside a request one batch job runs, and none that another embedding needs the place of."""
    backend = FakeBackend(200)
    backend.on_step = lambda _batch: time.sleep(0.002)
    with make_engine(tokenizer, backend, max_num_seqs=4) as engine:
        behind = submit(engine, [tuple(range(90))] * 8, BATCH)
        wait = start(engine, [ask("r", (1, 2, 3), max_tokens=80)])
        until(lambda: engine.stats().running == 1)
        for prompt, found in zip(PROMPTS, embed(engine, PROMPTS), strict=True):
            np.testing.assert_allclose(found, expected(prompt), atol=1e-6)
        assert engine.stats().running == 1, "they came before the request had ended"
        assert len(behind) < 8
        wait()
        until(lambda: len(behind) == 8)
        until(lambda: engine.is_idle)
        assert engine.stats().free_blocks == 200


def test_embeddings_leave_blocks_to_a_long_prompt(tokenizer):
    """They come without end, and the prompt needs more blocks than they leave."""
    backend, ended, stop = FakeBackend(40), [], threading.Event()
    with make_engine(tokenizer, backend, max_num_seqs=16, max_model_len=200) as engine:

        def flood():
            while not stop.is_set():
                submit(engine, [tuple(range(40))] * 12, ended=ended)
                until(lambda: len(ended) % 12 < 8)

        thread = threading.Thread(target=flood)
        thread.start()
        until(lambda: len(ended) > 20)
        try:
            [[answer]] = engine.complete([ask("r", tuple(range(170)), max_tokens=8)])
            assert len(answer.token_ids) == 8
        finally:
            stop.set()
            thread.join()


def test_tenants_take_turns_and_leave_each_other_room(tokenizer):
    backend, order = FakeBackend(200), []
    with make_engine(tokenizer, backend, max_num_seqs=1, max_waiting_tokens=1000) as engine:
        gate = threading.Event()
        backend.on_step = lambda _batch: gate.wait(10)
        submit(engine, [(1,) * 30])
        until(lambda: engine.embedder._running)
        for tenant, count in (("a", 6), ("b", 2)):
            jobs = [EmbedJob((1,) * 80, MIX, lambda _r, t=tenant: order.append(t), Owner(tenant)) for _ in range(count)]
            engine.embedder.submit(jobs)
        with pytest.raises(OverloadedError, match="half"):
            submit(engine, [(1,) * 80], Owner("a"))
        with pytest.raises(OverloadedError, match="half"):
            submit(engine, [(1,) * 80] * 7, Owner("c", is_background=True))
        submit(engine, [(1,) * 80], Owner("c"))
        gate.set()
        until(lambda: engine.is_idle)
    assert order[:5] == ["a", "b", "a", "b", "a"]


def test_a_step_that_fails_makes_requests_begin_again(tokenizer):
    """It is unknown what it left in the cache."""
    request = ask("r", (1, 2, 3), max_tokens=80)
    backend = FakeBackend(200)
    with make_engine(tokenizer, backend) as engine:
        [[alone]] = engine.complete([request])
        backend.on_step = lambda _batch: time.sleep(0.002)
        wait = start(engine, [request])
        until(lambda: engine.stats().running == 1)
        fail = backend.hidden
        backend.hidden = lambda _batch: 1 / 0
        assert isinstance(embed(engine, PROMPTS[:1])[0], MotetError)
        backend.hidden = fail
        assert wait()["r", 0].token_ids == alone.token_ids
        assert engine.stats().preemptions == 1


def test_a_batch_text_gives_its_blocks_to_a_request_that_waits(tokenizer):
    backend, ended = FakeBackend(40), []
    backend.on_step = lambda _batch: time.sleep(0.002)
    with make_engine(tokenizer, backend, max_num_seqs=4, max_model_len=320) as engine:
        submit(engine, [tuple(range(250))], BATCH, ended)
        wait = start(engine, [ask("a", (1, 2, 3), max_tokens=60)])
        until(lambda: engine.stats().running == 1)
        engine.complete([ask("b", tuple(range(100)), max_tokens=4)])
        assert engine.stats().running == 1 and not ended
        wait()
        until(lambda: ended)
