"""What the network may bring: every message, however wrong, is answered or refused, and health answers meanwhile."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

import grpc
import pytest
from fuzz.soak import soak
from fuzz.wire import fuzz
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.servers import serving
from motet.proto import inference_pb2, inference_pb2_grpc
from motet.runtime.api.limits import MAX_REQUEST_BYTES
from motet.runtime.serve.grpc import gate as gate_module
from motet.runtime.serve.grpc import server as server_module
from motet.runtime.trust.access import Access
from motet.runtime.trust.identity import Role
from motet.runtime.trust.keys import KeyFile, add_key

CODES = grpc.StatusCode


@contextlib.contextmanager
def watched(address):
    """Ask for health all the while; the longest wait in seconds is the last item of the list that is yielded."""
    waits, stop = [0.0], threading.Event()

    def ask():
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest())
            while not stop.wait(0.005):
                started = time.monotonic()
                assert stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status == 1
                waits.append(max(waits[-1], time.monotonic() - started))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield waits
    finally:
        stop.set()
        thread.join(30)
    assert len(waits) > 2, "health was not asked"


def complete(address, message, **options):
    with grpc.insecure_channel(address, options=options.pop("channel", [])) as channel:
        try:
            inference_pb2_grpc.InferenceStub(channel).Complete(message, timeout=20, **options)
        except grpc.RpcError as error:
            return error.code()
    return CODES.OK


def message(text="x", max_tokens=2):
    return inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text=text), stopping=inference_pb2.Stopping(max_tokens=max_tokens)
    )


def test_oversized_messages(address):
    with watched(address) as waits:
        unlimited = [("grpc.max_send_message_length", -1)]
        assert complete(address, message("x" * (2 * MAX_REQUEST_BYTES)), channel=unlimited) is CODES.RESOURCE_EXHAUSTED
        assert complete(address, message("x" * (MAX_REQUEST_BYTES - 100))) is CODES.INVALID_ARGUMENT
        chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="x")] * 10_000)
        talk = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(messages=chat))
        assert complete(address, talk) is CODES.INVALID_ARGUMENT
    assert waits[-1] < 1


def test_a_gzip_bomb(address):
    """A thousandth of its size travels; nothing is unpacked."""
    bomb = message("x" * (500 * MAX_REQUEST_BYTES))
    unlimited = [("grpc.max_send_message_length", -1)]
    assert complete(address, bomb, compression=grpc.Compression.Gzip, channel=unlimited) is not CODES.OK
    assert complete(address, message(), compression=grpc.Compression.Gzip) is CODES.UNIMPLEMENTED
    assert complete(address, message()) is CODES.OK


def test_ten_thousand_headers(address):
    many = [(f"x-header-{index}", "value") for index in range(10_000)]
    with watched(address):
        assert complete(address, message(), metadata=many) is CODES.RESOURCE_EXHAUSTED
        assert complete(address, message(), metadata=[("x-long", "v" * 100_000)]) is CODES.RESOURCE_EXHAUSTED
    assert complete(address, message()) is CODES.OK


def test_watchers_of_health(address, monkeypatch):
    """Strangers may watch, but not take every place."""
    monkeypatch.setattr(server_module, "MAX_WATCHERS", 3)
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watchers = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        assert [next(iter(watcher)).status for watcher in watchers] == [1] * 3
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(stub.Watch(health_pb2.HealthCheckRequest())))
        assert caught.value.code() is CODES.RESOURCE_EXHAUSTED
        assert complete(address, message()) is CODES.OK
        watchers[0].cancel()
        deadline = time.monotonic() + 5
        while True:  # the place is free again
            try:
                assert next(iter(stub.Watch(health_pb2.HealthCheckRequest()))).status == 1
                break
            except grpc.RpcError:
                assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "method", ["/motet.v1.Inference/Complete", "/motet.v1.Inference/Generate", "/grpc.health.v1.Health/Check"]
)
def test_calls_without_a_message(address, monkeypatch, method):
    """A call that is only begun is ended, and takes no place from others."""
    monkeypatch.setattr(gate_module, "_MESSAGE_S", 0.3)
    with grpc.insecure_channel(address) as channel:
        never = threading.Event()

        def nothing():
            never.wait(10)
            yield b""

        calls = [channel.stream_stream(method)(nothing(), timeout=20) for _ in range(8)]
        assert complete(address, message()) is CODES.OK
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is CODES.INVALID_ARGUMENT
            assert "no message came" in caught.value.details()
        never.set()


def test_a_host_begins_only_so_many_calls(address, monkeypatch):
    monkeypatch.setattr(gate_module, "MAX_BEGUN_CALLS", 4)
    monkeypatch.setattr(gate_module, "_MESSAGE_S", 1.0)
    with grpc.insecure_channel(address) as channel:
        never = threading.Event()

        def nothing():
            never.wait(10)
            yield b""

        calls = [channel.stream_stream("/grpc.health.v1.Health/Check")(nothing(), timeout=20) for _ in range(8)]
        codes = []
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            codes.append(caught.value.code())
        never.set()
    assert sorted(code.name for code in codes) == ["INVALID_ARGUMENT"] * 4 + ["RESOURCE_EXHAUSTED"] * 4
    assert complete(address, message()) is CODES.OK


def test_strangers_are_refused_before_their_message(engine, tmp_path):
    add_key(tmp_path / "keys.json", "acme", [Role.INFER])
    access = Access(KeyFile(tmp_path / "keys.json"))
    with serving(engine, access) as running, grpc.insecure_channel(running.address) as channel:
        never = threading.Event()

        def nothing():
            never.wait(10)
            yield b""

        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream("/motet.v1.Inference/Complete")(nothing(), timeout=20))
        assert caught.value.code() is CODES.UNAUTHENTICATED
        assert time.monotonic() - started < 5
        never.set()


def test_connections_are_bounded(engine, monkeypatch):
    options = [(n, 5 if n == "grpc.max_allowed_incoming_connections" else v) for n, v in server_module.OPTIONS]
    monkeypatch.setattr(server_module, "OPTIONS", options)
    with serving(engine) as running:
        port = running.server.port
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        time.sleep(0.1)
        open_now = 0
        for each in idle:
            each.settimeout(0.02)
            try:
                each.sendall(PREFACE)
                while each.recv(1000):
                    continue
            except TimeoutError:
                open_now += 1
            except OSError:
                continue
        for each in idle:
            each.close()
        assert open_now <= 6
        time.sleep(0.2)
        assert complete(running.address, message()) is CODES.OK


def frame(kind, flags, stream, content=b""):
    """An HTTP/2 frame (RFC 9113)."""
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
FLOODS = {
    "pings": frame(6, 0, 0, b"12345678") * 20_000,
    "settings": frame(4, 0, 0) * 20_000,
    "resets": b"".join(frame(3, 0, stream, b"\0\0\0\x08") for stream in range(1, 20_000, 2)),
    "no http": b"\x16\x03\x01" + b"\xff" * 100_000,
    "empty headers": b"".join(frame(1, 4, stream, b"") for stream in range(1, 20_000, 2)),
    "a frame without end": b"\xff\xff\xff\x00\x00" + b"\0" * 100_000,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_floods_of_frames(address, flood):
    with watched(address) as waits:
        with socket.create_connection(address.split(":"), timeout=20) as connection, contextlib.suppress(OSError):
            connection.sendall(PREFACE if flood != "no http" else b"")
            connection.sendall(FLOODS[flood])
            connection.settimeout(2)
            while connection.recv(1 << 16):
                continue
        time.sleep(0.05)
    assert waits[-1] < 1
    assert complete(address, message()) is CODES.OK


@pytest.mark.slow
def test_messages_that_are_none(engine):
    """`make fuzz-wire` sends 100,000."""
    with serving(engine) as running, watched(running.address) as waits:
        statuses = fuzz(running.address, 3000, seed=1)
    assert statuses[CODES.OK] > 100 and statuses[CODES.INVALID_ARGUMENT] > 500
    assert waits[-1] < 1
    assert engine.failure is None and engine.stats().restarts == 0


@pytest.mark.slow
def test_chaos(tokenizer):
    """`make soak` goes on for ten minutes."""
    ends = soak(tokenizer, 12, seed=1)
    assert ends["length"] > 50 and ends["preemptions"] > 5
    assert min(ends[way] for way in ("left", "cancelled", "time_limit", "error", "connection closed")) > 0
