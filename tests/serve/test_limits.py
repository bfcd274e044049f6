"""What a client may send and be sent: each limit is asked before the work that it bounds, and every refusal is short."""

from __future__ import annotations

import asyncio
import logging
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.callers import CALLER
from helpers.fake_backend import hold_first_step, make_engine
from motet.proto import inference_pb2, inference_pb2_grpc
from motet.runtime import errors
from motet.runtime.api import limits
from motet.runtime.api.output import Output, Timings, Usage
from motet.runtime.api.request import Ensemble, FinishReason, GenerateRequest, Member
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.client.client import Client
from motet.runtime.schedule.scheduler import Scheduler
from motet.runtime.serve.grpc import server as server_module
from motet.runtime.serve.grpc.answers import output_from_response, responses_from_output
from motet.runtime.serve.grpc.server import LIVENESS, SERVICES, Server
from motet.runtime.serve.grpc.statuses import error_of
from motet.runtime.serve.local import serve_engine
from motet.runtime.serve.metrics import engine_registry
from motet.runtime.serve.service import Service
from motet.runtime.trust.access import Access

GREEDY = {"temperature": 0.0, "ignore_eos": True}
FULL = limits.MAX_REQUEST_BYTES - 1000  # bytes of a prompt that fills a message


@pytest.fixture
def stub(address):
    with grpc.insecure_channel(address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def text(value):
    return inference_pb2.Prompt(text=value)


def messages(count, content=""):
    message = inference_pb2.ChatMessage(role="user", content=content)
    return inference_pb2.Prompt(messages=inference_pb2.ChatMessages(messages=[message] * count))


def ensemble(count, *, view=None, name="a"):
    member = inference_pb2.Member(name=name, mix=1 / count)
    if view is not None:
        member.view.prompt.CopyFrom(view)
    return inference_pb2.Ensemble(members=[member] * count)


def biases(count):
    return inference_pb2.Sampling(logit_bias=dict.fromkeys(range(count), 1.0))


def huge_mix():
    members = [inference_pb2.Member(name=name, mix=1.7e308) for name in "ab"]
    return inference_pb2.Ensemble(members=members)


TOO_MUCH = {
    "prompt": ({"prompt": text("x" * FULL)}, "bytes, which is more than 96 tokens"),
    "token-ids": (
        {"prompt": inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=[5] * 10**6))},
        "the context holds 96",
    ),
    "messages": ({"prompt": messages(50_000)}, "at most 4096 messages, got 50000"),
    "conversation": ({"prompt": messages(2, "x" * (FULL // 2))}, "the conversation has more than"),
    "members": ({"prompt": text("x"), "ensemble": ensemble(32_000)}, "1 to 64 members, got 32000"),
    "views": ({"prompt": text("x"), "ensemble": ensemble(16_000, view=text("y"))}, "1 to 64 members, got 16000"),
    "name": (
        {"prompt": text("x"), "ensemble": ensemble(1, name="n" * 6000)},
        "text of 1 to 256 bytes of UTF-8, got 'nnn",
    ),
    "unknown-name": ({"prompt": text("x"), "ensemble": ensemble(1, name="é" * 128)}, "is not a member of"),
    "request-id": ({"prompt": text("x"), "request_id": "i" * FULL}, "request_id must be text of 0 to 256 bytes"),
    "logit-bias": ({"prompt": text("x"), "sampling": biases(70_000)}, "70000 token ids; at most 65536"),
    "mix": ({"prompt": text("x"), "ensemble": huge_mix()}, "must be a number in"),
    "role": (
        {"prompt": inference_pb2.Prompt(messages={"messages": [{"role": "r" * 9999, "content": "x"}]})},
        "got role 'rrr",
    ),
}


@pytest.mark.parametrize("case", TOO_MUCH)
@pytest.mark.parametrize("call", ["Generate", "Complete"])
def test_too_much_is_refused_unread(stub, engine, monkeypatch, case, call):
    """Nothing is tokenised, nothing reaches the engine, and the answer is one short typed error."""
    fields, words = TOO_MUCH[case]
    if case != "unknown-name":  # that is asked with the model at hand, when the prompt has been read
        monkeypatch.setattr(engine.tokenizer, "encode", lambda *_args, **_options: pytest.fail("it was tokenised"))
    method, message = getattr(stub, call), inference_pb2.GenerateRequest(**fields)
    with pytest.raises(grpc.RpcError) as caught:
        list(method(message)) if call == "Generate" else method(message)
    error = error_of(caught.value)
    assert isinstance(error, errors.InvalidRequestError)
    assert error.field
    assert words in str(error)
    assert len(str(error).encode()) < 400
    assert engine.stats().steps == 0


def test_a_text_that_may_fit_is_tokenised(stub, engine):
    """The longest token has 13 bytes: 96 of them may be 1,248 bytes. This text is many more tokens, and is counted."""
    with pytest.raises(grpc.RpcError, match="1248 tokens"):
        list(stub.Generate(inference_pb2.GenerateRequest(prompt=text("x" * 1248))))
    with pytest.raises(grpc.RpcError, match="1249 bytes"):
        list(stub.Generate(inference_pb2.GenerateRequest(prompt=text("x" * 1249))))


def test_an_error_is_cut_to_what_a_trailer_holds(address, engine, monkeypatch):
    def refuse(*_args):
        raise errors.InvalidRequestError("é" * 100_000, field="prompt")

    monkeypatch.setattr(engine, "submit", refuse)
    with Client(address) as client, pytest.raises(errors.InvalidRequestError, match=r"é…$") as caught:
        client.complete("x")
    assert len(str(caught.value).encode()) <= limits.MAX_ERROR_BYTES + 3
    assert caught.value.field == "prompt"


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_that_cannot_be_delivered_is_not_computed(tokenizer, backend):
    many = {
        "sampling": inference_pb2.Sampling(n=64, logprobs=64),
        "stopping": inference_pb2.Stopping(max_tokens=90, ignore_eos=True),
    }
    message = inference_pb2.GenerateRequest(prompt=text("x"), **many)
    with make_engine(tokenizer, backend) as engine, serve_engine(engine) as address:
        with grpc.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            with pytest.raises(grpc.RpcError, match=r"may have 5760 tokens .* stream it") as caught:
                stub.Complete(message)
            assert backend.batches == []
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            message.stopping.max_tokens = 20
            whole = stub.Complete(message)
        with Client(address) as client:  # it streams
            choices = client.complete("x", n=64, logprobs=64, max_tokens=90, **GREEDY)
    assert {len(choice.token_ids) for choice in whole.choices} == {20}
    assert [len(choice.top_logprobs) for choice in choices] == [90] * 64
    assert limits.MAX_MESSAGE_BYTES / 8 < whole.ByteSize() < limits.MAX_MESSAGE_BYTES


def test_a_slow_reader_gets_small_messages():
    count = 3000
    output = Output(
        "id", 1, 7, "aé" * 50_000, list(range(count)), [-1.0] * count, [[(i, -1.5) for i in range(64)]] * count,
        [[-2.0, -3.0]] * count, [0.5] * count, [0.25] * count, FinishReason.LENGTH, None, Usage(3, count),
        Timings(1.0, 2.0, 3.0), None, 0.5, True,
    )  # fmt: skip
    pieces = list(responses_from_output(output))
    assert max(piece.ByteSize() for piece in pieces) <= limits.MAX_DELTA_BYTES + 1000
    assert [piece.finish_reason for piece in pieces[:-1]] == [0] * (len(pieces) - 1)
    assert not any(piece.HasField("usage") or piece.HasField("answer_confidence") for piece in pieces[:-1])
    joined = output_from_response(pieces[0])
    for piece in pieces[1:]:
        joined.extend(output_from_response(piece))
    assert joined == output


def test_open_requests_are_counted_until_they_are_read(tokenizer):
    async def run():
        with make_engine(tokenizer, max_requests=2) as engine:
            service = Service(engine)
            request = GenerateRequest("x", sampling=SamplingParams(max_tokens=3, **GREEDY))
            streams = [service.generate(request, CALLER) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            while not engine.is_idle:  # both are computed, and nobody has read them to the end
                await asyncio.sleep(0.01)
            with pytest.raises(errors.OverloadedError, match=r"2 requests .* are open"):
                await service.complete(request, CALLER)
            await streams[0].aclose()
            assert len((await service.complete(request, CALLER))[0].token_ids) == 3

    asyncio.run(run())


# ---- faults ----------------------------------------------------------------------------------------------------------


def health_of(address, service=""):
    with grpc.insecure_channel(address) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status


def test_health_says_that_the_engine_is_dead(tokenizer, monkeypatch):
    with make_engine(tokenizer) as engine, serve_engine(engine) as address:
        registry = engine_registry(engine)
        assert registry.get_sample_value("motet_engine_up") == 1
        assert health_of(address) == health_pb2.HealthCheckResponse.SERVING
        monkeypatch.setattr(Scheduler, "schedule", lambda _self: 1 / 0)
        with Client(address) as client:
            for _ in range(4):  # three times it starts again
                assert health_of(address, LIVENESS) == health_pb2.HealthCheckResponse.SERVING
                with pytest.raises(errors.MotetError, match="the engine stopped"):
                    client.complete("x")
            deadline = time.monotonic() + 10
            while client.is_serving():
                assert time.monotonic() < deadline
            with pytest.raises(errors.UnavailableError, match="the engine stopped"):
                client.complete("x")
        for service in ("", *SERVICES, LIVENESS):
            assert health_of(address, service) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert registry.get_sample_value("motet_engine_up") == 0


def test_a_fault_of_ours_is_logged_under_a_number_and_not_told(address, engine, monkeypatch, caplog):
    def fail(*_args):
        raise RuntimeError("/etc/secret holds 12345")

    monkeypatch.setattr(engine, "submit", fail)
    with Client(address) as client, pytest.raises(errors.MotetError, match=r"internal error [0-9a-f]{12}") as caught:
        client.complete("x")
    assert "secret" not in str(caught.value)
    number = str(caught.value).split()[2].rstrip(";")
    [record] = [record for record in caplog.records if number in record.getMessage()]
    assert record.levelno == logging.ERROR
    assert "/etc/secret" in str(record.exc_info[1])


@pytest.mark.parametrize("method", ["Inference/Generate", "Inference/Complete", "Inference/Tokenize", "Admin/GetModel"])
def test_bytes_that_are_no_message(address, method):
    with grpc.insecure_channel(address) as channel:
        kind = channel.unary_stream if method.endswith("Generate") else channel.unary_unary
        call = kind(f"/motet.v1.{method}")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(b"\xff\xff\xff")) if method.endswith("Generate") else call(b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"3 bytes are no message of /motet.v1.{method}" in caught.value.details()


# ---- endings ---------------------------------------------------------------------------------------------------------


def start(engine, **options):
    async def serve():
        server = Server(Service(engine), Access.open_to_all(), **options)
        await server.start()
        return server

    return serve


def test_drain_must_be_allowed(engine):
    async def run():
        server = await start(engine)()
        with Client(f"127.0.0.1:{server.port}") as client:
            with pytest.raises(errors.PermissionDeniedError, match="needs the role admin"):
                await asyncio.to_thread(client.drain)
            assert await asyncio.to_thread(client.is_serving)
        await server.stop()

    asyncio.run(run())


def test_a_shutdown_ends_answers_with_what_they_have(tokenizer, backend):
    """The client gets the tokens so far and the reason, and no error."""
    backend.on_step = lambda _batch: time.sleep(0.02)

    async def run():
        with make_engine(tokenizer, backend) as engine:
            server = await start(engine)()
            with Client(f"127.0.0.1:{server.port}") as client:
                deltas = client.generate("x", max_tokens=90, **GREEDY)
                first = await asyncio.to_thread(next, deltas)
                stopping = asyncio.create_task(server.stop(drain_timeout_s=0.1))
                rest = await asyncio.to_thread(list, deltas)
                await stopping
        assert rest[-1].finish_reason is FinishReason.SHUTDOWN
        assert 0 < len(first.token_ids) + sum(len(delta.token_ids) for delta in rest) < 90
        assert rest[-1].usage.completion_tokens < 90

    asyncio.run(run())


def test_a_watcher_of_health_does_not_hold_up_the_end(engine):
    async def run():
        server = await start(engine)()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            seen = [(await watch.read()).status]
            await asyncio.wait_for(server.stop(drain_timeout_s=60), timeout=5)
            seen.append((await watch.read()).status)
        assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]

    asyncio.run(run())


def test_errors_of_the_connection_are_told_apart(engine, backend):
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(errors.UnavailableError, match="is `motet serve` running there"),
    ):
        client.complete("x", timeout_s=20)
    held, go = hold_first_step(backend)

    async def run():
        server = await start(engine)()
        with Client(f"127.0.0.1:{server.port}") as client:
            running = asyncio.create_task(asyncio.to_thread(client.complete, "x", **GREEDY))
            while not held.is_set():
                await asyncio.sleep(0.01)
            await server._server.stop(0)  # it is gone in the middle of an answer
            with pytest.raises(errors.UnavailableError, match="the connection to the server broke"):
                await running
        go.set()

    asyncio.run(run())


@pytest.mark.slow
def test_pings_while_a_request_waits_are_welcome(engine, backend, monkeypatch):
    """At the fastest permitted rate; with gRPC's own policy the fourth ping ends the connection. The rate is the server's in
    small."""
    name, interval = "grpc.http2.min_ping_interval_without_data_ms", 800
    assert dict(server_module.OPTIONS)[name] > interval
    own = [(key, interval if key == name else value) for key, value in server_module.OPTIONS]
    monkeypatch.setattr(server_module, "OPTIONS", own)
    held, go = hold_first_step(backend)
    options = [
        ("grpc.keepalive_time_ms", interval + 200),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_time_between_pings_ms", interval),
    ]
    with serve_engine(engine) as address, grpc.insecure_channel(address, options=options) as channel:
        message = inference_pb2.GenerateRequest(prompt=text("x"), stopping=inference_pb2.Stopping(max_tokens=3))
        answer = inference_pb2_grpc.InferenceStub(channel).Generate(message)
        assert held.wait(10)
        time.sleep(5 * (interval + 200) / 1000)
        go.set()
        assert sum(len(delta.token_ids) for delta in answer) >= 1


def test_a_default_ensemble_needs_no_more_than_the_limits():
    """The table's limits are what the checks of the requests use."""
    members = tuple(Member(f"m{i}", 1 / limits.MAX_MEMBERS) for i in range(limits.MAX_MEMBERS))
    assert len(Ensemble(members).members) == limits.MAX_MEMBERS
    with pytest.raises(errors.InvalidEnsembleError, match="1 to 64 members, got 65"):
        Ensemble((*members, Member("one more", 0.0)))
    for mix in (limits.MAX_MIX * 1.01, float("nan")):
        with pytest.raises(errors.InvalidEnsembleError, match="must be a number in"):
            Ensemble((Member("a", mix), Member("b", 1 - mix)))
