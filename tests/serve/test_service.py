"""The service without a door: what it fills in, checks, joins, cancels and drains, over the fake backend."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing

import pytest
from helpers.callers import CALLER
from helpers.fake_backend import hold_first_step
from motet.runtime import errors
from motet.runtime.api.output import Output
from motet.runtime.api.request import Ensemble, FinishReason, GenerateRequest, Member
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.serve.service import Delivery, OutputQueue, Service


def ask(prompt="hello", *, max_tokens=12, **fields):
    names = ("n", "seed", "min_tokens")
    sampling = {name: fields.pop(name) for name in names if name in fields}
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **sampling)
    return GenerateRequest(prompt, sampling=params, **fields)


async def gather(service, request):
    return [output async for output in service.generate(request, CALLER)]


async def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def is_free(engine):
    return engine.is_idle and engine.stats().free_blocks == engine.stats().num_blocks


def submitted(engine, monkeypatch):
    """The requests that reach the engine."""
    seen, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda request, *told: (seen.append(request), submit(request, *told)))
    return seen


def test_deltas_are_the_whole_of_each_choice(engine):
    async def run():
        service = Service(engine)
        request = ask(n=3, seed=5, request_id="mine")
        return await gather(service, request), await service.complete(request, CALLER)

    deltas, whole = asyncio.run(run())
    assert [choice.choice for choice in whole] == [0, 1, 2]
    for choice in whole:
        parts = [delta for delta in deltas if delta.choice == choice.choice]
        assert "".join(delta.text for delta in parts) == choice.text
        assert [token_id for delta in parts for token_id in delta.token_ids] == choice.token_ids
        assert [delta.finish_reason for delta in parts[:-1]] == [None] * (len(parts) - 1)
        assert choice.finish_reason is FinishReason.LENGTH
        assert choice.usage.completion_tokens == 12
    assert {output.request_id for output in (*deltas, *whole)} == {"mine"}


def test_what_the_caller_leaves_out(engine, monkeypatch):
    seen = submitted(engine, monkeypatch)
    outputs = asyncio.run(gather(Service(engine), ask()))
    assert seen[0].ensemble == engine.model.default_ensemble
    assert {output.request_id for output in outputs} == {seen[0].request_id}


def test_views_with_equal_tokens_are_one(engine, tokenizer, monkeypatch):
    seen = submitted(engine, monkeypatch)
    ids = tuple(tokenizer.encode("other"))
    ensemble = Ensemble((Member("a", 0.5), Member("b", 0.25, 1), Member("a", 0.125, 2), Member("b", 0.125, 3)))
    views = ("other", ids, "hello")
    asyncio.run(gather(Service(engine), ask(ensemble=ensemble, views=views)))
    assert seen[0].prompts == (tuple(tokenizer.encode("hello")), ids)
    assert [member.view for member in seen[0].ensemble.members] == [0, 1, 1, 0]


def test_equal_views_do_not_hide_a_member_that_is_named_twice(engine):
    ensemble = Ensemble((Member("a", 0.5), Member("a", 0.5, 1)))
    with pytest.raises(errors.InvalidEnsembleError, match="named twice"):
        asyncio.run(gather(Service(engine), ask(ensemble=ensemble, views=("hello",))))


@pytest.mark.parametrize(
    ("request_", "error", "message", "field"),
    [
        (lambda: ask(""), errors.InvalidRequestError, "prompt is empty", "prompt"),
        (lambda: ask([999]), errors.InvalidRequestError, "token id 999", "prompt"),
        (lambda: ask([2**31]), errors.InvalidRequestError, "every token id of a prompt", "prompt"),
        (lambda: ask("x" * 100), errors.ContextLengthError, "100 tokens", "prompt"),
        (lambda: ask([1, {"role": "user", "content": "x"}]), errors.InvalidRequestError, "mixture", "prompt"),
        (lambda: ask([{"role": "user"}]), errors.InvalidRequestError, "a role and a content, and may have", "messages"),
        (lambda: ask([{"role": "x", "content": "y"}]), errors.InvalidRequestError, "got role 'x'", "messages"),
        (lambda: ask(None), errors.InvalidRequestError, "got NoneType", "prompt"),
        (lambda: ask("\ud800"), errors.InvalidRequestError, "not valid Unicode", "prompt"),
        (lambda: ask(ensemble=Ensemble((Member("z", 1.0),))), errors.InvalidEnsembleError, "its members are", None),
    ],
)
def test_refusals(engine, request_, error, message, field):
    async def run():
        service = Service(engine)
        with pytest.raises(error, match=message) as caught:
            await service.complete(request_(), CALLER)
        assert field is None or caught.value.field == field
        assert len((await service.complete(ask(), CALLER))[0].token_ids) == 12

    asyncio.run(run())


def test_a_fault_of_our_own_is_a_typed_error_too(engine, monkeypatch):
    def broken(_text, add_special_tokens):
        raise RuntimeError("the tokenizer broke")

    monkeypatch.setattr(engine.tokenizer, "encode", broken)
    with pytest.raises(errors.MotetError, match="its log has the error") as caught:
        asyncio.run(Service(engine).complete(ask(), CALLER))
    assert "tokenizer broke" not in str(caught.value)  # what our exceptions say is not for clients


def test_an_error_of_a_choice_is_raised(engine):
    engine._backend.nan_seeds = {7}
    with pytest.raises(errors.NumericalError):
        asyncio.run(Service(engine).complete(ask(seed=7), CALLER))


def test_closing_the_iterator_ends_the_request(engine, backend):
    """The third step waits until it is closed, however late that is."""
    steps, closed = [], threading.Event()

    def on_step(_batch):
        steps.append(1)
        assert len(steps) < 3 or closed.wait(timeout=30)

    backend.on_step = on_step

    async def run():
        async with aclosing(Service(engine).generate(ask(max_tokens=80), CALLER)) as outputs:
            async for _output in outputs:
                break
        closed.set()
        await until(lambda: is_free(engine))

    asyncio.run(run())
    assert engine.stats().tokens < 80


def test_cancelling_the_reader_ends_its_request_and_no_other(engine, backend):
    """Both have the same id; the engine never sees it."""
    held, go = hold_first_step(backend)

    async def run():
        service = Service(engine)
        first = asyncio.create_task(service.complete(ask(max_tokens=80, request_id="same"), CALLER))
        second = asyncio.create_task(service.complete(ask(max_tokens=40, request_id="same"), CALLER))
        await until(lambda: held.is_set() and engine.stats().waiting + engine.stats().running == 2)
        first.cancel()
        await asyncio.wait({first})
        go.set()
        completion = (await second)[0]
        await until(lambda: is_free(engine))
        return first.cancelled(), completion

    cancelled, completion = asyncio.run(run())
    assert cancelled
    assert (len(completion.token_ids), completion.request_id) == (40, "same")
    assert engine.stats().tokens < 80 + 40


def test_deltas_that_wait_for_a_slow_reader_are_joined():
    async def run():
        delivery = Delivery().here()
        queue = OutputQueue(delivery)
        sent = [
            Output("x", choice, 0, text=f"{choice}{index}", token_ids=[index])
            for index in range(50)
            for choice in (0, 1)
        ]
        thread = threading.Thread(target=lambda: [queue.put(output) for output in sent])
        thread.start()
        thread.join()
        delivery.wake()
        await asyncio.sleep(0)
        taken = await queue.take()
        assert [output.choice for output in taken] == [0, 1], "the queue holds one delta per choice"
        for output in taken:
            assert output.token_ids == list(range(50))
            assert output.text == "".join(f"{output.choice}{index}" for index in range(50))
        queue.put(Output("x", 1, 0, text="next"))
        await asyncio.sleep(0)
        assert not queue._ready.is_set(), "it comes with the next wake"
        delivery.wake()
        assert [output.text for output in await queue.take()] == ["next"]

    asyncio.run(run())


def test_tokenize_and_models(engine, tokenizer):
    async def run():
        service = Service(engine)
        assert await service.tokenize("hello", CALLER) == tuple(tokenizer.encode("hello"))
        chat = [{"role": "user", "content": "hi"}]
        assert await service.tokenize(chat, CALLER) == tuple(tokenizer.encode_chat(chat))
        assert service.models(CALLER) == [engine.model]
        assert service.model("", CALLER) is service.model("fake", CALLER) is engine.model
        with pytest.raises(errors.NotFoundError, match="no model 'other' here; this server serves 'fake'"):
            service.model("other", CALLER)

    asyncio.run(run())


def test_a_delta_that_comes_after_the_loop(caplog):
    async def run():
        return Delivery().here()

    delivery = asyncio.run(run())
    OutputQueue(delivery).put(Output("x", 0, 0, text="late"))
    delivery.wake()
    assert not caplog.records


@pytest.mark.parametrize("interval", [1, 5, 1000])
def test_tokens_per_delta(engine, interval):
    """The first token is sent at once, then so many at a time, and the rest with the end; the tokens are the same."""

    async def run():
        return await gather(Service(engine, stream_interval=interval), ask(n=2, seed=3, max_tokens=23))

    deltas, whole = asyncio.run(run()), asyncio.run(Service(engine).complete(ask(n=2, seed=3, max_tokens=23), CALLER))
    for choice in whole:
        sizes = [len(delta.token_ids) for delta in deltas if delta.choice == choice.choice]
        parts = [token for delta in deltas if delta.choice == choice.choice for token in delta.token_ids]
        assert parts == choice.token_ids
        assert sizes[0] >= 1
        assert len(sizes) <= 2 + 2 * 22 // interval + 1
        if interval == 1000:
            assert sum(sizes) == 23 and len(sizes) <= 3


def test_draining_ends_what_is_here_and_takes_no_more(engine, backend):
    held, go = hold_first_step(backend)

    async def run():
        service = Service(engine)
        running = asyncio.create_task(service.complete(ask(), CALLER))
        draining = asyncio.create_task(service.wait_out_of_service())
        await until(held.is_set)
        assert not draining.done()
        service.drain()
        await draining
        with pytest.raises(errors.UnavailableError, match="shutting down"):
            await service.complete(ask(), CALLER)
        assert not await service.wait_idle(0.05)
        idle = asyncio.create_task(service.wait_idle(60))
        await asyncio.sleep(0.05)
        assert not idle.done()
        go.set()
        assert len((await running)[0].token_ids) == 12
        assert await idle

    asyncio.run(run())
