"""Tenants beside each other: nothing of one is seen by another, and a flood of one does not stop the others."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.callers import caller
from helpers.fake_backend import FakeBackend, hold_first_step, make_engine
from helpers.servers import serving, until
from motet.proto import admin_pb2
from motet.runtime import errors
from motet.runtime.api.request import FinishReason, GenerateRequest
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.client.client import Client
from motet.runtime.client.connection import Connection
from motet.runtime.serve.calls import CallLog, JsonFormatter
from motet.runtime.serve.service import Service
from motet.runtime.trust.access import Access
from motet.runtime.trust.identity import Role
from motet.runtime.trust.keys import KeyFile, add_key
from motet.runtime.trust.quotas import read_limits

GREEDY = {"temperature": 0.0, "ignore_eos": True}
PROMPT = "the same long prompt of both"


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.json"
    return {name: add_key(path, name, [Role.INFER]) for name in ("a", "b")}


@pytest.fixture
def access(keys, tmp_path):
    return Access(KeyFile(tmp_path / "keys.json"))


def ask(prompt="hello", **fields):
    return GenerateRequest(prompt, sampling=SamplingParams(max_tokens=4, **GREEDY), **fields)


def cached(client, **options):
    return client.complete(PROMPT, max_tokens=2, **GREEDY, **options)[0].usage.cached_tokens


def test_prefixes_are_shared_within_a_tenant_only(engine, access, keys):
    with (
        serving(engine, access) as running,
        Client(Connection(running.address, keys["a"])) as a,
        Client(Connection(running.address, keys["b"])) as b,
    ):
        assert cached(a) == 0
        whole = cached(a)
        assert whole > 0
        assert cached(b) == 0  # the first time, although another tenant has sent it twice
        assert cached(b) == whole
        assert cached(a, cache_salt="x") == 0
        assert cached(a, cache_salt="x") == whole
        assert cached(b, cache_salt="x") == 0


def test_abort_reaches_the_own_tenant_only(engine, backend, access, keys):
    backend.on_step = lambda _batch: time.sleep(0.01)
    with (
        serving(engine, access) as running,
        Client(Connection(running.address, keys["a"])) as a,
        Client(Connection(running.address, keys["b"])) as b,
    ):
        mine, theirs = (c.generate("x", max_tokens=80, request_id="same", **GREEDY) for c in (a, b))
        assert next(mine).token_ids and next(theirs).token_ids
        assert a.abort("same") == 1
        assert a.abort("same-not") == a.abort("") == 0
        ended = list(mine)
        assert ended[-1].finish_reason is FinishReason.CANCELLED
        assert list(theirs)[-1].finish_reason is FinishReason.LENGTH


def test_a_flood_of_one_leaves_the_other_quick(tokenizer, access, keys):
    """All places and the queue are full of one tenant's long answers. Steps take 5 ms, so times are counts of steps."""
    backend = FakeBackend(num_blocks=512)
    backend.on_step = lambda _batch: time.sleep(0.005)
    with (
        make_engine(tokenizer, backend, max_num_seqs=4, max_waiting=64) as engine,
        serving(engine, access) as running,
        Client(Connection(running.address, keys["a"])) as flood,
        Client(Connection(running.address, keys["b"])) as b,
    ):
        quiet = b.complete("hello", max_tokens=1, **GREEDY)[0].timings
        pool = ThreadPoolExecutor(24)
        floods = [flood.generate(f"flood {i}", max_tokens=80, **GREEDY) for i in range(24)]
        ends = [pool.submit(list, each) for each in floods]
        until(lambda: engine.stats().waiting >= 15)
        first = [b.complete(f"hello {i}", max_tokens=1, **GREEDY)[0].timings for i in range(8)]
        assert engine.stats().waiting >= 10, "the flood was over"
        worst = max(t.queue_s + t.prefill_s for t in first)
        assert worst < quiet.queue_s + quiet.prefill_s + 0.05  # ten steps; a whole answer of the flood takes 80
        for end in ends:
            assert sum(len(delta.token_ids) for delta in end.result(60)) == 80  # and nothing of the flood is lost
        pool.shutdown()


def test_a_tenant_has_half_of_the_queue(tokenizer, backend):
    held, go = hold_first_step(backend)

    async def run():
        with make_engine(tokenizer, backend, max_num_seqs=1, max_waiting=4) as engine:
            service = Service(engine)
            tasks = [asyncio.create_task(service.complete(ask(), caller("a")))]
            while not held.is_set():
                await asyncio.sleep(0.005)
            tasks += [asyncio.create_task(service.complete(ask(), caller("a"))) for _ in range(2)]
            while engine.stats().waiting < 2:
                await asyncio.sleep(0.005)
            with pytest.raises(errors.OverloadedError, match="2 choices of tenant 'a' are waiting"):
                await service.complete(ask(), caller("a"))
            tasks += [asyncio.create_task(service.complete(ask(), caller("b"))) for _ in range(2)]
            while engine.stats().waiting < 4:
                await asyncio.sleep(0.005)
            with pytest.raises(errors.OverloadedError, match="4 choices are waiting"):
                await service.complete(ask(), caller("c"))
            go.set()
            assert len(await asyncio.gather(*tasks)) == 5

    asyncio.run(asyncio.wait_for(run(), 60))


def test_quotas_hold(engine):
    limits = read_limits({"a": {"tokens_per_minute": 14}, "b": {"requests_per_minute": 1}})

    async def run():
        service = Service(engine, limits=limits)
        await service.complete(ask(), caller("a"))  # five tokens of the prompt, four of the answer
        with pytest.raises(errors.OverloadedError, match="14 tokens per minute") as caught:
            await service.complete(ask("hello, hello"), caller("a"))
        assert 0 < caught.value.retry_after_s < 60
        await service.complete(ask(), caller("b"))
        with pytest.raises(errors.OverloadedError, match="1 requests per minute"):
            await service.complete(ask(), caller("b"))
        for _ in range(3):
            await service.complete(ask(), caller("c"))

    asyncio.run(asyncio.wait_for(run(), 60))


def test_drafts_are_one_request(engine):
    limits = read_limits({"a": {"max_requests": 1, "requests_per_minute": 2}, "b": {"max_waiting": 2}})

    async def run():
        service = Service(engine, limits=limits)
        drafted = GenerateRequest("hello", sampling=SamplingParams(max_tokens=4, temperature=1.0), drafts=3)
        assert len(await service.complete(drafted, caller("a"))) == 1
        assert len(await service.complete(drafted, caller("a"))) == 1
        with pytest.raises(errors.OverloadedError, match="2 requests per minute"):
            await service.complete(drafted, caller("a"))
        with pytest.raises(errors.InvalidRequestError, match="at most 2 choices of a tenant"):
            await service.complete(drafted, caller("b"))

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_load_is_for_those_who_watch(engine, tmp_path):
    keys = {role: add_key(tmp_path / "k.json", "a", [role]) for role in (Role.INFER, Role.MONITOR)}
    held = GenerateRequest("x", sampling=SamplingParams(max_tokens=90, **GREEDY))
    with serving(engine, Access(KeyFile(tmp_path / "k.json"))) as running:
        backend = engine._backend
        backend.on_step = lambda _batch: time.sleep(0.02)
        task = running.start(running.service.complete(held, caller("a")))
        until(lambda: engine.stats().running == 1)
        for role, seen in ((Role.INFER, 0), (Role.MONITOR, 1)):
            with Client(Connection(running.address, keys[role])) as client:
                found = client._admin.GetModel(admin_pb2.GetModelRequest(), metadata=client._metadata)
                assert found.running == seen
        task.result(30)


def test_batch_work_yields(tokenizer):
    backend = FakeBackend(num_blocks=256)
    backend.on_step = lambda _batch: time.sleep(0.003)

    async def run():
        with make_engine(tokenizer, backend, max_num_seqs=2) as engine:
            service = Service(engine)
            long = GenerateRequest("job", sampling=SamplingParams(max_tokens=80, **GREEDY))
            jobs = [asyncio.create_task(service.complete(long, caller("a", Role.BATCH))) for _ in range(4)]
            while engine.stats().running < 2:
                await asyncio.sleep(0.003)
            [answer] = await service.complete(ask(), caller("a"))
            assert answer.timings.queue_s < 0.05
            assert not any(job.done() for job in jobs)
            assert [len((await job)[0].token_ids) for job in jobs] == [80] * 4

    asyncio.run(asyncio.wait_for(run(), 60))


def test_priorities(tokenizer, backend):
    held, go = hold_first_step(backend)

    async def run():
        with make_engine(tokenizer, backend, max_num_seqs=1) as engine:
            service, order = Service(engine), []

            async def one(priority):
                await service.complete(ask(priority=priority), caller("a"))
                order.append(priority)

            tasks = [asyncio.create_task(one(0))]
            while not held.is_set():
                await asyncio.sleep(0.003)
            for index, priority in enumerate((5, 0, -5)):
                tasks.append(asyncio.create_task(one(priority)))
                while engine.stats().waiting <= index:
                    await asyncio.sleep(0.003)
            go.set()
            await asyncio.gather(*tasks)
            assert order == [0, -5, 0, 5]

    asyncio.run(asyncio.wait_for(run(), 60))


def test_each_call_is_logged_without_its_text(engine, caplog):
    caplog.set_level(logging.INFO, "motet.calls")

    async def run():
        service = Service(engine, sinks=[CallLog()])
        await service.complete(ask("secret words", request_id="mine"), caller("acme", subject="key:7"))
        with pytest.raises(errors.InvalidRequestError):
            await service.complete(ask("x" * 500), caller("acme"))

    asyncio.run(asyncio.wait_for(run(), 60))
    done, refused = [
        json.loads(JsonFormatter().format(record)) for record in caplog.records if record.name == "motet.calls"
    ]
    assert done["method"] == "complete" and done["status"] == "ok" and done["request_id"] == "mine"
    assert (done["tenant"], done["subject"], done["completion_tokens"]) == ("acme", "key:7", 4)
    assert done["finish_reasons"] == ["length"] and 0 < done["first_token_s"] <= done["duration_s"]
    assert refused["status"] == "ContextLengthError" and refused["completion_tokens"] == 0
    assert "secret" not in caplog.text
