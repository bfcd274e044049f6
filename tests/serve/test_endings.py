"""However a call ends, wherever it is: what was taken is given back, and whoever waits is told."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.callers import CALLER
from helpers.fake_backend import FakeBackend, hold_first_step, make_engine
from helpers.servers import is_free, serving, until
from motet.proto import inference_pb2, inference_pb2_grpc
from motet.runtime import errors
from motet.runtime.api.request import GenerateRequest
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.client.client import Client
from motet.runtime.serve.grpc.server import LIVENESS
from motet.runtime.serve.service import Service

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def ask(max_tokens=60, **fields):
    return GenerateRequest("hello", sampling=SamplingParams(max_tokens=max_tokens, **GREEDY), **fields)


def message(max_tokens=60, **fields):
    return inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text="hello"),
        sampling=inference_pb2.Sampling(temperature=0.0),
        stopping=inference_pb2.Stopping(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )


# ---- cancelling, stage by stage --------------------------------------------------------------------------------------


class Stage:
    """Holds a request at one place of its way until it was cancelled."""

    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()

    def hold(self, function):
        def held(*arguments, **options):
            self.reached.set()
            assert self.go.wait(20)
            return function(*arguments, **options)

        return held


@pytest.mark.parametrize("place", ["tokenise", "submit", "queue", "prefill", "decode", "stream", "draft"])
def test_cancelled_at_every_stage(tokenizer, monkeypatch, place):
    backend = FakeBackend(num_blocks=64, order=2)
    with make_engine(tokenizer, backend, max_num_seqs=1, speculative_tokens=4) as engine:
        stage = Stage()
        steps = {"prefill": 1, "decode": 3, "draft": 6}

        def on_step(batch):
            time.sleep(0.001)
            if len(backend.batches) + 1 >= steps.get(place, 1 << 30) and not stage.reached.is_set():
                stage.hold(lambda: None)()

        backend.on_step = on_step
        if place == "tokenise":
            monkeypatch.setattr(tokenizer, "encode", stage.hold(tokenizer.encode))
        if place == "submit":
            monkeypatch.setattr(engine._admission, "groups_of", stage.hold(engine._admission.groups_of))
        if place == "queue":
            first, go = hold_first_step(backend)

        async def run():
            service = Service(engine)
            other = None
            if place == "queue":
                other = asyncio.create_task(service.complete(ask(4), CALLER))
                while not first.is_set():
                    await asyncio.sleep(0.002)
            task = asyncio.create_task(read(service))
            if place == "queue":
                while engine.stats().waiting < 1:
                    await asyncio.sleep(0.002)
            elif place == "stream":
                while not pieces:
                    await asyncio.sleep(0.002)
            elif place == "submit":  # it holds the event loop itself: let it go, and cancel at its end
                stage.go.set()
                await asyncio.sleep(0)
            else:
                while not stage.reached.is_set():
                    await asyncio.sleep(0.002)
            task.cancel()
            stage.go.set()
            if place == "queue":
                go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            if other is not None:
                assert len((await other)[0].token_ids) == 4
            while not is_free(engine, service):
                await asyncio.sleep(0.002)
            monkeypatch.undo()
            backend.on_step = lambda _batch: None
            assert len((await service.complete(ask(4), CALLER))[0].token_ids) == 4

        pieces = []

        async def read(service):
            async for output in service.generate(ask(80), CALLER):
                pieces.append(output)

        asyncio.run(asyncio.wait_for(run(), 30))


def test_what_expired_in_the_queue_is_never_computed(tokenizer, backend):
    held, go = hold_first_step(backend)
    with make_engine(tokenizer, backend, max_num_seqs=1) as engine, serving(engine) as running:
        with Client(running.address) as client:
            first = client.generate("first", max_tokens=3, **GREEDY)
            reader = threading.Thread(target=list, args=(first,))
            reader.start()
            assert held.wait(10)
            with pytest.raises(errors.MotetError, match="DEADLINE_EXCEEDED"):
                client.complete("second", max_tokens=3, timeout_s=0.001, **GREEDY)
            with pytest.raises(errors.MotetError, match="DEADLINE_EXCEEDED"):
                client.complete("third", max_tokens=3, timeout_s=0.1, **GREEDY)
            until(lambda: running.service._quotas.num_open == 1)  # the server knows that they are gone
            go.set()
            reader.join(10)
        until(lambda: is_free(engine, running.service))
        assert engine.stats().prompt_tokens == len("first")


def test_a_hundred_streams_of_which_ten_are_cancelled(tokenizer):
    """At random points; the other 90 are those of solo runs, token for token."""
    rng = random.Random(5)
    with (
        make_engine(tokenizer, FakeBackend(num_blocks=96), max_num_seqs=12, max_waiting=128) as engine,
        serving(engine) as running,
        Client(running.address) as client,
    ):
        options = [{"max_tokens": 30 + i % 40, "seed": i, "temperature": 0.9, "ignore_eos": True} for i in range(100)]
        solo = [client.complete(f"prompt {i}", **options[i])[0].token_ids for i in range(100)]
        cancelled = set(rng.sample(range(100), 10))
        streams = [client.generate(f"prompt {i}", **options[i]) for i in range(100)]

        def read(i):
            tokens, stop = [], rng.randrange(1, 25)
            for delta in streams[i]:
                tokens += delta.token_ids
                if i in cancelled and len(tokens) >= stop:
                    break
            streams[i].close()
            return tokens

        with ThreadPoolExecutor(100) as pool:
            found = list(pool.map(read, range(100)))
        for i in range(100):
            assert found[i] == (solo[i][: len(found[i])] if i in cancelled else solo[i])
        until(lambda: is_free(engine, running.service))


# ---- readers that do not read ----------------------------------------------------------------------------------------


def test_a_reader_that_stops_is_ended(tokenizer):
    """Its answer is larger than what the connection buffers. Another stream does not notice."""
    backend = FakeBackend(num_blocks=512, block_size=64)
    with (
        make_engine(tokenizer, backend, max_model_len=8000) as engine,
        serving(engine, service={"send_timeout_s": 0.3}) as running,
        grpc.insecure_channel(running.address) as channel,
        Client(running.address) as client,
    ):
        big = message(7000)
        big.sampling.logprobs = 40
        call = inference_pb2_grpc.InferenceStub(channel).Generate(big)
        next(iter(call))
        answer = client.complete("other", max_tokens=60, **GREEDY)[0]
        assert len(answer.token_ids) == 60
        until(lambda: is_free(engine, running.service), 60)
        assert len(client.complete("after", max_tokens=5, **GREEDY)[0].token_ids) == 5
        call.cancel()


def test_a_slow_reader_is_not_ended(tokenizer, backend):
    """Slow is not gone: each piece is taken in time."""

    async def run():
        with make_engine(tokenizer, backend) as engine:
            service, seen = Service(engine, send_timeout_s=0.2), 0
            async for output in service.generate(ask(60), CALLER):
                seen += len(output.token_ids)
                await asyncio.sleep(0.1)
            assert seen == 60

    asyncio.run(run())


# ---- going out of service --------------------------------------------------------------------------------------------


def health(address, service=""):
    with grpc.insecure_channel(address) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status


def test_those_that_run_finish_and_those_that_wait_are_told(tokenizer):
    """Six run, four wait; the server is told to end. Health says so within 100 ms."""
    backend = FakeBackend(num_blocks=128)
    backend.on_step = lambda _batch: time.sleep(0.01)
    with make_engine(tokenizer, backend, max_num_seqs=6) as engine, serving(engine, drain_timeout_s=20) as running:
        results = []

        def one(client, index):
            try:
                results.append(len(client.complete(f"{index}", max_tokens=60, **GREEDY)[0].token_ids))
            except errors.MotetError as error:
                results.append(type(error))

        with Client(running.address) as client:
            threads = [threading.Thread(target=one, args=(client, index)) for index in range(10)]
            for thread in threads:
                thread.start()
            until(lambda: engine.stats().running == 6 and engine.stats().waiting == 4)
            told = time.monotonic()
            running.call(running.service.leave)
            until(lambda: health(running.address) == health_pb2.HealthCheckResponse.NOT_SERVING)
            assert time.monotonic() - told < 0.1
            assert health(running.address, LIVENESS) == health_pb2.HealthCheckResponse.SERVING
            stopping = running.start(running.server.stop(20))
            for thread in threads:
                thread.join(30)
            stopping.result(30)
        assert sorted(map(str, results)) == sorted(map(str, [60] * 6 + [errors.UnavailableError] * 4))


def test_a_lame_duck_still_answers(engine):
    with serving(engine, lame_duck_s=0.4) as running, Client(running.address) as client:
        stopping = running.start(running.server.stop(5))
        until(lambda: not client.is_serving())
        assert len(client.complete("x", max_tokens=3, **GREEDY)[0].token_ids) == 3
        stopping.result(30)
        with pytest.raises(errors.UnavailableError):
            client.complete("x", timeout_s=5)


def test_a_second_signal_ends_a_lame_duck(engine):
    with serving(engine, lame_duck_s=60) as running:
        stopping = running.start(running.server.stop(60))
        time.sleep(0.05)
        running.call(running.service.shut_down)
        stopping.result(10)
