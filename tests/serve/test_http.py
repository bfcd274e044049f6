"""The HTTP door's own duties: who may call, what is bounded, and how a request ends."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time

import pytest
from helpers.fake_backend import FakeBackend, make_engine
from helpers.http_door import ASK, ask, bearer, complete, raw, start
from helpers.servers import is_free, serving_http, until
from motet.bench.lib.certificates import Authority
from motet.runtime.api.limits import MAX_METADATA_BYTES, MAX_REQUEST_BYTES
from motet.runtime.serve.calls import CallLog
from motet.runtime.serve.http import app, server
from motet.runtime.serve.http.routes import ROUTES
from motet.runtime.serve.metrics import engine_registry
from motet.runtime.trust.access import Access
from motet.runtime.trust.identity import Role
from motet.runtime.trust.keys import KeyFile, add_key
from motet.runtime.trust.tls import TlsFiles

PATHS = [(route.method, route.path.replace("{name:path}", "fake").replace("{id}", "x")) for route in ROUTES]


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def keys(key_file):
    return {str(role): add_key(key_file, "acme", [role]) for role in Role}


@pytest.fixture(scope="module")
def guarded(tokenizer, keys, key_file):
    with (
        make_engine(tokenizer, FakeBackend(64)) as engine,
        serving_http(engine, Access(KeyFile(key_file)), registry=engine_registry(engine)) as (address, _service),
    ):
        yield address


# ---- who may call ----------------------------------------------------------------------------------------------------

STRANGERS = {
    "nothing": lambda keys: {},
    "another scheme": lambda keys: {"Authorization": f"Basic {keys['admin']}"},
    "wrong": lambda keys: bearer(keys["admin"][:-1] + ("A" if keys["admin"][-1] != "A" else "B")),
    "no ASCII": lambda keys: {"Authorization": "Bearer ké"},
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize(
    ("method", "path"), [*PATHS, ("GET", "/v1/nothing"), ("POST", "/../metrics"), ("DELETE", "/v1/models")]
)
def test_strangers_are_refused_everywhere(guarded, keys, method, path, stranger):
    status, headers, body = ask(guarded, method, path, b"{}", STRANGERS[stranger](keys))
    if path == "/health":
        assert status == 200
    else:
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert json.loads(body)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("route", [route for route in ROUTES if route.path != "/health"], ids=lambda route: route.path)
def test_roles(guarded, keys, route, role):
    [(method, path)] = [one for one, own in zip(PATHS, ROUTES) if own is route]
    status, _, _ = ask(guarded, method, path, b"{}", bearer(keys[role]))
    assert (status == 403) == (role not in route.roles)
    assert status != 401


def test_every_route_has_roles():
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)
    assert all(route.roles and route.roles <= set(Role) for route in ROUTES)


def test_a_route_that_is_not_there(guarded, keys):
    status, _, body = ask(guarded, "GET", "/v1/nothing", headers=bearer(keys["infer"]))
    assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", sorted({path for _, path in PATHS}))
def test_a_method_that_is_not_there(guarded, keys, path):
    """Whatever the route, the answer is the door's JSON, and says which methods there are."""
    status, headers, body = ask(guarded, "PATCH", path, headers=bearer(keys["infer"]))
    found = json.loads(body)["error"]
    assert (status, found["type"], found["code"]) == (405, "invalid_request_error", "method_not_allowed")
    methods = {method for method, other in PATHS if other == path}
    assert headers["Allow"].split(", ") == sorted(methods | ({"HEAD"} if "GET" in methods else set()))
    assert "PATCH" in found["message"]


def test_tls_and_its_reload(tokenizer, tmp_path):
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    pair, later = authority.issue("server"), other.issue("later")
    tls = TlsFiles(pair.certificate, pair.key)
    with make_engine(tokenizer) as engine, serving_http(engine, tls=tls) as (address, _service):
        first, second = (ssl.create_default_context(cafile=str(one.path)) for one in (authority, other))
        assert ask(address, "GET", "/health", context=first)[0] == 200
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(address, "GET", "/health")
        with pytest.raises(ssl.SSLError):
            ask(address, "GET", "/health", context=second)
        pair.certificate.write_bytes(later.certificate.read_bytes())
        pair.key.write_bytes(later.key.read_bytes())
        until(lambda: _answers(address, second))
        with pytest.raises(ssl.SSLError):
            ask(address, "GET", "/health", context=first)


def _answers(address, context):
    try:
        return ask(address, "GET", "/health", context=context)[0] == 200
    except ssl.SSLError:
        return False


# ---- what is bounded -------------------------------------------------------------------------------------------------

BODIES = {
    "no JSON": (b"hello", 400),
    "half JSON": (b'{"model": "fake", ', 400),
    "no UTF-8": (b'{"model": "\xff", "prompt": "x"}', 400),
    "half a character": (b'{"model": "fake", "prompt": "\\ud800"}', 400),
    "deep": (b'{"model": "fake", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "an array": (b"[]", 400),
    "empty": (b"", 400),
    "too large": (b'{"prompt": "' + b"x" * MAX_REQUEST_BYTES + b'"}', 400),
    "a huge number": (b'{"model": "fake", "prompt": "x", "max_tokens": 1' + b"0" * 400 + b"}", 400),
    "NaN": (b'{"model": "fake", "prompt": "x", "temperature": NaN}', 400),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies(tokenizer, case):
    content, status = BODIES[case]
    with make_engine(tokenizer) as engine, serving_http(engine) as (address, service):
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses"):
            found, _, body = ask(address, "POST", path, content)
            assert found == status
            assert json.loads(body)["error"]["type"] == "invalid_request_error"
        assert complete(address)[0] == 200
        assert is_free(engine, service)


def test_headers_are_bounded(tokenizer):
    many = b"".join(b"x%d: y\r\n" % i for i in range(10_000))
    with make_engine(tokenizer) as engine, serving_http(engine) as (address, _service):
        for headers in (many, b"x: " + b"y" * 10 * MAX_METADATA_BYTES + b"\r\n"):
            found = raw(address, b"GET /health HTTP/1.1\r\nHost: x\r\n" + headers)
            assert found == b"" or found.startswith(b"HTTP/1.1 400")
        found = raw(address, b"\x16\x03\x01 not HTTP\r\n\r\n")
        assert found.startswith(b"HTTP/1.1 400")
        assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
        assert complete(address)[0] == 200


def test_what_does_not_come_in_time_is_ended(tokenizer, monkeypatch):
    monkeypatch.setattr(server, "_HEADERS_S", 0.2)
    monkeypatch.setattr(app, "_BODY_S", 0.2)
    with make_engine(tokenizer) as engine, serving_http(engine) as (address, service):
        assert raw(address, b"") == b""
        assert raw(address, b"GET /health HTTP/1.1\r\nHost") == b""
        late = raw(
            address, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{"
        )
        assert late.startswith(b"HTTP/1.1 400")
        assert b"did not come within" in late
        assert complete(address)[0] == 200
        assert is_free(engine, service)


def test_compressed_bodies_are_no_json(tokenizer):
    with make_engine(tokenizer) as engine, serving_http(engine) as (address, _service):
        assert ask(address, "POST", "/v1/completions", b"\x1f\x8b\x08", {"Content-Encoding": "gzip"})[0] == 400


# ---- how a request ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away(tokenizer, stream, n):
    backend = FakeBackend(64)
    backend.on_step = lambda _batch: time.sleep(0.005)
    with make_engine(tokenizer, backend) as engine, serving_http(engine) as (address, service):
        connection = start(address, max_tokens=80, stream=stream, n=n)
        until(lambda: engine.stats().tokens > 3)
        connection.close()
        until(lambda: is_free(engine, service))
        assert engine.stats().tokens < 80 * n
        assert complete(address)[0] == 200


def test_a_prompt_of_several_that_fails_ends_the_others(tokenizer):
    backend = FakeBackend(64)
    backend.on_step = lambda _batch: time.sleep(0.002)
    with make_engine(tokenizer, backend) as engine, serving_http(engine) as (address, service):
        for stream in (True, False):
            backend.fail_next = False
            with start(address, prompt=["a", "b", "c"], max_tokens=80, stream=stream) as connection:
                tokens = engine.stats().tokens
                if stream:  # it has begun
                    found = connection.recv(1 << 20)
                until(lambda: engine.stats().tokens > tokens)  # noqa: B023
                backend.fail_next = True
                if not stream:
                    found = connection.recv(1 << 20)
                until(lambda: is_free(engine, service))
                assert b"200 OK" in found if stream else b"500" in found
        assert complete(address)[0] == 200


def test_a_reader_that_stops_is_ended(tokenizer):
    """Its answer is larger than what the connection buffers."""
    backend = FakeBackend(num_blocks=512, block_size=64)
    with (
        make_engine(tokenizer, backend, max_model_len=8000) as engine,
        serving_http(engine, service={"send_timeout_s": 0.3}) as (address, service),
    ):
        with start(address, max_tokens=7000, logprobs=40, stream=True):
            until(lambda: engine.stats().tokens > 0)
            assert complete(address, max_tokens=60)[0] == 200
            until(lambda: is_free(engine, service), 60)
        assert complete(address)[0] == 200


def test_overload_and_drain_have_their_statuses(tokenizer):
    backend = FakeBackend(64)
    backend.on_step = lambda _batch: time.sleep(0.005)
    with make_engine(tokenizer, backend, max_num_seqs=1, max_waiting=1) as engine:
        with serving_http(engine) as (address, service), start(address, max_tokens=80) as first:
            until(lambda: engine.stats().running == 1)
            with start(address, max_tokens=80):
                until(lambda: engine.stats().waiting == 1)
                status, headers, body = ask(address, "POST", "/v1/completions", ASK)
                assert (status, int(headers["Retry-After"]) >= 1) == (429, True)
                assert json.loads(body)["error"]["type"] == "rate_limit_error"
                service.drain()
                assert ask(address, "GET", "/health")[0] == 503
                assert complete(address)[0] == 503
                assert b"200 OK" in first.recv(1 << 16)
        until(lambda: is_free(engine))


def test_calls_are_recorded_with_their_user(tokenizer, caplog):
    caplog.set_level("INFO", "motet.calls")
    with make_engine(tokenizer) as engine, serving_http(engine, service={"sinks": [CallLog()]}) as (address, _service):
        complete(address, user="person 7")
        complete(address, temperature=-1, user="person 8")
        complete(address, colour="red")
    seen = [
        (r.fields["method"], r.fields["status"], r.fields["end_user"]) for r in caplog.records if hasattr(r, "fields")
    ]
    assert seen == [
        ("complete", "ok", "person 7"),
        ("generate", "InvalidRequestError", "person 8"),
        ("generate", "InvalidRequestError", ""),
    ]


def test_a_fault_shows_a_number_and_no_more(tokenizer, monkeypatch, caplog):
    with make_engine(tokenizer) as engine, serving_http(engine) as (address, service):

        def broken(_caller):
            raise RuntimeError("/etc/secret")

        monkeypatch.setattr(service, "models", broken)
        status, _, body = ask(address, "GET", "/v1/models")
        assert status == 500
        assert b"secret" not in body
        assert "/etc/secret" in caplog.text


def test_metrics_are_shown(guarded, keys):
    status, _, body = ask(guarded, "GET", "/metrics", headers=bearer(keys["monitor"]))
    assert status == 200
    assert b"motet_" in body


def test_dimensions_that_there_are_not_cost_nothing(tokenizer):
    backend = FakeBackend(64)
    with make_engine(tokenizer, backend) as engine, serving_http(engine) as (address, _service):
        content = b'{"model": "fake", "input": "x", "dimensions": 7}'
        status, _, body = ask(address, "POST", "/v1/embeddings", content)
        assert (status, json.loads(body)["error"]["param"]) == (400, "dimensions")
        assert "have 4 dimensions here, got 7" in json.loads(body)["error"]["message"]
        monkey = []
        backend.on_step = monkey.append
        assert ask(address, "POST", "/v1/embeddings", content)[0] == 400 and not monkey
        assert ask(address, "POST", "/v1/embeddings", content.replace(b"7", b"4"))[0] == 200 and monkey


def test_embeddings_of_a_client_that_goes_away(tokenizer):
    backend = FakeBackend(64)
    backend.on_step = lambda _batch: time.sleep(0.02)
    with make_engine(tokenizer, backend) as engine, serving_http(engine) as (address, service):
        host, _, port = address.partition(":")
        body = json.dumps({"input": ["many words " * 7] * 60}).encode()
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            until(lambda: not engine.embedder.is_idle)
        began = time.monotonic()
        until(lambda: is_free(engine, service))
        assert time.monotonic() - began < 3, "60 texts would take more"


def test_idle_connections_have_an_end(tokenizer, monkeypatch):
    """Whatever bytes are sent, as long as they are no request."""
    monkeypatch.setattr(server, "_KEEP_ALIVE_S", 0.3)
    with make_engine(tokenizer) as engine, serving_http(engine) as (address, _service):
        request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        for more in (b"", b"\r\n"):
            began = time.monotonic()
            found = raw(address, request, more=more, wait_s=0.1)
            assert found.startswith(b"HTTP/1.1 200")
            assert time.monotonic() - began < 3


def test_a_refusal_arrives_although_the_body_is_still_coming(guarded):
    body = b"x" * (4 * MAX_METADATA_BYTES)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    )
    found = raw(guarded, head, more=body, wait_s=0.2)
    assert found.startswith(b"HTTP/1.1 401")
    assert found.count(b"HTTP/1.1") == 1
