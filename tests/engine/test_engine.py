"""The engine over the fake backend: what a request gets does not depend on who else is there."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from helpers.fake_backend import FakeBackend, ask, gather, hold_first_step, make_engine, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from motet.runtime.api.request import Ensemble, FinishReason, Member, Request, Space
from motet.runtime.api.sampling import SamplingParams

LETTERS = dict.fromkeys(range(64, 90), 50.0)  # token ids that are ASCII letters


@st.composite
def requests(draw):
    """Requests with views of different lengths, ensembles, sampling, several choices; some prompts begin alike."""
    result = []
    for index in range(draw(st.integers(1, 6))):
        lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=2))
        texts = [np.random.default_rng(draw(st.integers(0, 2))).integers(0, 255, n) for n in lengths]
        prompts = [tuple(text.tolist()) for text in texts]
        mix = [Member("a", 0.7), Member(draw(st.sampled_from("bc")), 0.3, len(prompts) - 1)]
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


def test_a_view_has_one_sequence_for_all_its_members(tokenizer):
    seen = []
    backend = FakeBackend()
    backend.on_step = seen.append
    members = (Member("a", 0.5), Member("b", 0.2), Member("c", 0.2), Member("c", 0.1, 1))
    with make_engine(tokenizer, backend) as engine:
        engine.complete([ask("x", views=[(4, 5, 6)], ensemble=Ensemble(members))])
    batch = seen[-1]
    assert batch.members == [(0, 1, 2), (2,)]
    assert batch.samples[0].terms == ((0, 0, 0.5), (0, 1, 0.2), (0, 2, 0.2), (1, 2, 0.1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests(), st.integers(14, 40), st.booleans(), st.booleans())
def test_solo_is_batched_is_preempted(tokenizer, batch, num_blocks, sample_prefill, keeps_trunk):
    """The same tokens alone with ample blocks, together without sharing, and together with so few blocks that groups are
    preempted and recomputed; and once more, when their prefixes are cached. Whether or not the step that ends a prompt
    draws its first token, and whether or not the trunk of a prefix serves members that did not run over it."""
    with make_engine(tokenizer, FakeBackend(200)) as engine:
        alone = [engine.complete([request])[0] for request in batch]
    backend = FakeBackend(200, can_sample_prefill=sample_prefill, keeps_trunk=keeps_trunk)
    with make_engine(tokenizer, backend, prefix_cache=False) as engine:
        unshared = engine.complete(batch)
        assert engine.stats().cached_tokens == 0
    backend = FakeBackend(num_blocks, can_sample_prefill=sample_prefill, keeps_trunk=keeps_trunk)
    with make_engine(tokenizer, backend) as engine:
        together = engine.complete(batch)
        again = engine.complete(batch)
        engine._scheduler.check_integrity()
        assert engine.stats().free_blocks == num_blocks
    expected = [[c.token_ids for c in choices] for choices in alone]
    for results in (unshared, together, again):
        assert [[c.token_ids for c in choices] for choices in results] == expected


def test_preemption_happens(tokenizer):
    backend = FakeBackend(9)
    with make_engine(tokenizer, backend) as engine:
        batch = [ask(f"r{i}", [i] * 20, max_tokens=30) for i in range(3)]
        results = engine.complete(batch)
        rows, samples = (sum(column) for column in zip(*backend.batches))
    assert all(len(choices[0].token_ids) == 30 for choices in results)
    assert samples == 90
    assert rows > 3 * (
        20 + 29
    )  # nine blocks do not hold three groups of fifty positions: some rows were computed twice


def test_a_cached_prefix_is_counted(tokenizer):
    """Blocks of 8: of 20 tokens 16 are shared, by a later request and by the other choices of one."""
    with make_engine(tokenizer) as engine:
        first = engine.complete([ask("x", range(20), n=2)])[0]
        later = engine.complete([ask("y", range(22), max_tokens=1)])[0][0]
        other = engine.complete([ask("z", range(1, 20))])[0][0]
        stats = engine.stats()
    assert [c.usage.cached_tokens for c in (*first, later, other)] == [0, 16, 16, 0]
    assert (stats.prompt_tokens, stats.cached_tokens) == (20 + 20 + 22 + 19, 32)


def test_equal_prompts_with_different_salts_share_nothing(tokenizer):
    with make_engine(tokenizer) as engine:
        salts = (b"", b"x", b"y", b"x", b"")
        results = [engine.complete([ask("r", range(20), cache_salt=salt)])[0][0] for salt in salts]
    assert [result.usage.cached_tokens for result in results] == [0, 0, 0, 16, 16]
    assert all(result.token_ids == results[0].token_ids for result in results)


def test_choices_differ_and_repeat(tokenizer):
    with make_engine(tokenizer) as engine:
        first = engine.complete([ask("x", temperature=1.0, seed=5, n=3)])[0]
        again = engine.complete([ask("y", temperature=1.0, seed=5, n=3)])[0]
        single = engine.complete([ask("z", temperature=1.0, seed=5)])[0]
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert first[0].token_ids == single[0].token_ids
    assert len({tuple(c.token_ids) for c in first}) == 3


def test_cancel_frees_all_blocks_at_any_time(tokenizer):
    with make_engine(tokenizer, FakeBackend(40)) as engine:
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


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests(), st.integers(14, 40), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=5))
def test_cancelling_some_leaves_the_others_as_they_were(tokenizer, batch, num_blocks, aborts):
    """Cancelled in any step, while blocks are short: what was cancelled has a beginning of its answer."""
    with make_engine(tokenizer, FakeBackend(200)) as engine:
        whole = gather(engine, batch)
    backend = FakeBackend(num_blocks)
    with make_engine(tokenizer, backend) as engine:
        backend.on_step = lambda _: [engine.abort(f"r{index}") for at, index in aborts if at == len(backend.batches)]
        found = gather(engine, batch)
        assert engine.stats().free_blocks == num_blocks
    for key, output in found.items():
        count = len(output.token_ids)
        assert output.token_ids == whole[key].token_ids[:count]
        assert output.finish_reason in (FinishReason.LENGTH, FinishReason.CANCELLED)
        if output.finish_reason is FinishReason.LENGTH:
            assert count == len(whole[key].token_ids)
        else:
            assert key[0] in {f"r{index}" for _, index in aborts}


def test_stop_strings(tokenizer):
    """Bytes are tokens here: a stop string of two letters spans two of them, and is in no delta."""
    deltas = []
    with make_engine(tokenizer) as engine:
        plain = engine.complete([ask("p", max_tokens=30, logit_bias=LETTERS)])[0][0]
        stop = plain.text[10:13]
        assert stop.isascii()
        at = plain.text.index(stop)
        request = ask("s", max_tokens=30, logit_bias=LETTERS, stop=("no such", stop))
        stopped = engine.complete([request], on_output=deltas.append)[0][0]
    assert (stopped.finish_reason, stopped.stop_matched) == (FinishReason.STOP, stop)
    assert stopped.text == plain.text[:at] == "".join(delta.text for delta in deltas)
    assert stopped.token_ids == plain.token_ids[: at + 3]


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


class Clock:
    """In place of the engine's `time`: a second passes with each step of the backend."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def tick(self, _batch=None):
        self.now += 1.0

    def backend(self):
        backend = FakeBackend()
        backend.on_step = self.tick
        return backend


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("motet.runtime.engine.engine.time", clock)
    return clock


def test_time_limit_gives_what_there_is(tokenizer, clock):
    with make_engine(tokenizer, clock.backend()) as engine:
        result = engine.complete([ask("t", max_tokens=50, time_limit_s=5.5)])[0][0]
    assert result.finish_reason is FinishReason.TIME_LIMIT
    assert len(result.token_ids) == 5  # a step of prefill, five tokens, and 6 s are over


def test_time_limit_of_a_request_that_waits(tokenizer, clock):
    with make_engine(tokenizer, clock.backend(), max_num_seqs=1) as engine:
        results = gather(engine, [ask("a", max_tokens=30), ask("b", time_limit_s=9.0)])
    assert results["a", 0].finish_reason is FinishReason.LENGTH
    assert (results["b", 0].finish_reason, results["b", 0].token_ids) == (FinishReason.TIME_LIMIT, [])
    assert results["b", 0].timings.queue_s == 9.0


def test_timings_and_usage(tokenizer, clock):
    """20 tokens of prompt: chunks of 8, 8 and 3, then a step a token; the second request waits for all of that."""
    with make_engine(tokenizer, clock.backend(), max_num_seqs=1) as engine:
        results = gather(engine, [ask("a", [1] * 20, max_tokens=4), ask("b", [1] * 20, max_tokens=4)])
    timings = results["a", 0].timings
    assert (timings.queue_s, timings.prefill_s, timings.decode_s) == (0.0, 4.0, 3.0)
    assert results["b", 0].timings.queue_s == 7.0
    usage = results["a", 0].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (20, 4, 0)


def test_deltas_belong_to_the_callback(tokenizer):
    """Coalescing them elsewhere does not change what a callback keeps."""
    deltas = []
    with make_engine(tokenizer) as engine:
        whole = engine.complete([ask("x", logprobs=1)], on_output=deltas.append)[0][0]
    assert [len(delta.token_ids) for delta in deltas] == [1] * 12
    assert [t for delta in deltas for t in delta.token_ids] == whole.token_ids
    assert [p for delta in deltas for p in delta.logprobs] == whole.logprobs
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [delta.finish_reason for delta in deltas] == [None] * 11 + [FinishReason.LENGTH]


def test_an_abort_does_not_reach_a_later_request_of_the_same_name(tokenizer):
    """A client that cancels and asks again. All three come while the engine is in one step."""
    backend = FakeBackend()
    held, go = hold_first_step(backend)
    with make_engine(tokenizer, backend) as engine:
        waiting = start(engine, [ask("other", max_tokens=2)])
        assert held.wait(timeout=30)
        ended = []
        done = threading.Event()
        engine.submit(ask("x"), lambda output: ended.append(output.finish_reason))
        engine.abort("x")
        engine.submit(
            ask("x"), lambda output: output.finish_reason and (ended.append(output.finish_reason), done.set())
        )
        go.set()
        assert done.wait(timeout=30)
        waiting()
    assert ended == [FinishReason.CANCELLED, FinishReason.LENGTH]


def test_an_idle_engine_sleeps(tokenizer):
    with make_engine(tokenizer) as engine:
        engine.complete([ask("x")])
        calls = []
        schedule = engine._scheduler.schedule
        engine._scheduler.schedule = lambda: calls.append(1) or schedule()
        engine.abort("nobody")
        time.sleep(0.1)
        assert engine.is_idle
        assert len(calls) <= 1  # the look after the abort


def test_close_cancels_with_what_there_is(tokenizer):
    backend = FakeBackend()
    engine = make_engine(tokenizer, backend, max_num_seqs=1)
    closing = threading.Thread(target=engine.close)

    def on_step(_batch):
        if len(backend.batches) == 4:
            closing.start()
            while not engine._inbox.is_closed:
                time.sleep(0.001)

    backend.on_step = on_step
    results = gather(engine, [ask("x", max_tokens=50), ask("y")])
    closing.join(timeout=30)
    assert len(results["x", 0].token_ids) == 4  # a step of prefill, then four with a token
    assert {output.finish_reason for output in results.values()} == {FinishReason.CANCELLED}
    assert results["y", 0].token_ids == []
    assert engine.stats().free_blocks == 32
    engine.close()
    assert backend.closed == 1
