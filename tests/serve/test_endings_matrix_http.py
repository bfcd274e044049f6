"""Every HTTP route × every way in which a request ends: what was taken is given back, and the next one is answered."""

from __future__ import annotations

import json
import select
import socket
import time
from types import SimpleNamespace

import pytest
from helpers.fake_backend import FakeBackend, make_engine
from helpers.http_door import ask, complete
from helpers.servers import is_free, serving_http, until
from motet.runtime.api.request import FinishReason
from motet.runtime.serve.http.routes import ROUTES
from motet.runtime.serve.metrics import engine_registry
from motet.runtime.trust.access import Access

pytestmark = pytest.mark.slow
OPTIONS = {"model": "fake", "temperature": 0, "ignore_eos": True}
CHAT = {**OPTIONS, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 60}
RESPONSE = {**OPTIONS, "input": "hello", "max_output_tokens": 60}
COMPLETION = {**OPTIONS, "prompt": "hello", "max_tokens": 60}
BOUNDARY = "0123456789"
LINE = {"custom_id": "1", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 60, "ignore_eos": True}}
FORM = (
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    f"{json.dumps(LINE)}\n\r\n--{BOUNDARY}--\r\n"
)

# The bodies of a route, by what is particular about them. A route with a body that is not here is not answered with 200.
BODIES = {
    "POST /v1/chat/completions": {"": CHAT, "stream": CHAT | {"stream": True}, "choices": CHAT | {"n": 3}},
    "POST /v1/completions": {
        "": COMPLETION,
        "stream": COMPLETION | {"stream": True},
        "prompts": COMPLETION | {"prompt": ["hello", "there"]},
        "drafts": COMPLETION | {"drafts": 3, "temperature": 1.0},
        "scored": COMPLETION | {"prompt_logprobs": 1},
    },
    "POST /v1/responses": {"": RESPONSE, "stream": RESPONSE | {"stream": True}},
    "POST /v1/embeddings": {"": {"input": ["hello", "a longer text than that"]}},
    "POST /v1/summarise": {"": {"text": "a text " * 80, "chunk_tokens": 120, "max_summary_tokens": 30}},
    "POST /v1/classify": {"": {"text": "hello", "labels": ["yes", "no", "neither of them"]}},
    "POST /v1/files": {"": FORM.encode()},
    "POST /v1/batches": {"": {"input_file_id": "FILE", "endpoint": "/v1/completions"}},
}
CASES = [
    (route, what) for route in ROUTES for what in BODIES.get(f"{route.method} {route.path}", {"": b""})
]  # what the door's router is made of
GENERATES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@pytest.fixture(scope="module")
def running(tokenizer, tmp_path_factory):
    """One server for all: each test ends with one that is free."""
    backend, apps = FakeBackend(600, vocab_size=259), []
    with (
        make_engine(tokenizer, backend, max_model_len=600, max_num_batched_tokens=64) as engine,
        serving_http(
            engine,
            registry=engine_registry(engine),
            state=tmp_path_factory.mktemp("jobs"),
            prepare=apps.append,
        ) as (address, service),
    ):
        assert {(route.method, route.path) for route in ROUTES} == set(apps[0].routes)
        yield SimpleNamespace(address=address, service=service, app=apps[0], engine=engine, backend=backend)


def sent(running, method, path, body, headers=()):
    status, _, found = ask(running.address, method, path, body, headers)
    assert status == 200, found
    return json.loads(found)


def begin(running, route, body, limit):
    """A connection over which a request was sent; it closes after the answer. `limit`: seconds that it may take, if the route
    knows them."""
    file = batch = ""
    if "{id}" in route.path or route.path == "/v1/batches":
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        file = sent(running, "POST", "/v1/files", FORM.encode(), headers)["id"]
    if route.path.startswith("/v1/batches/"):
        batch = sent(running, "POST", "/v1/batches", {"input_file_id": file, "endpoint": "/v1/completions"})["id"]
    path = route.path.replace("{name:path}", "fake").replace("{id}", batch or file)
    kind = "application/json"
    if isinstance(body, dict):
        body = body | {"time_limit_s": limit} if limit and route.path in GENERATES else body
        body = json.dumps(body).replace("FILE", file).encode()
    elif body:
        kind = f"multipart/form-data; boundary={BOUNDARY}"
    head = f"{route.method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {kind}\r\n"
    host, _, port = running.address.partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def rest(connection):
    """What comes until the connection ends, however it does."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionError:
        pass
    return found


def finish(_connection, _running, _before):
    """Nothing is done to it."""


def wait_until_begun(connection, running, before):
    """Until the engine has made a step of it, or its answer has come."""
    until(lambda: running.engine.stats().steps > before or select.select([connection], [], [], 0)[0])


def cancel(connection, running, before):
    wait_until_begun(connection, running, before)
    connection.close()


def deadline(connection, _running, _before):
    """A route that knows no limit of time has a client that waits no longer."""
    select.select([connection], [], [], 0.05)


def error(_connection, running, _before):
    running.backend.fail_next = True


def shutdown(connection, running, before):
    wait_until_begun(connection, running, before)
    running.engine.abort(None, FinishReason.SHUTDOWN)


def is_released(running):
    app, jobs = running.app, running.app.door.jobs
    is_quiet = not app._num_open and not app.door._begun and not app.door.uploads.total() and not jobs._running
    return is_quiet and is_free(running.engine, running.service)


def ends_of_jobs(running):
    """The states of all batches; none runs any more."""
    page = sent(running, "GET", "/v1/batches?limit=100", b"")
    return {one["status"] for one in page["data"]}


@pytest.mark.parametrize("ending", [finish, cancel, deadline, error, shutdown])
@pytest.mark.parametrize(
    ("route", "what"), CASES, ids=[f"{route.method} {route.path} {what}".strip() for route, what in CASES]
)
def test_what_was_taken_is_given_back(running, route, what, ending):
    body = BODIES.get(f"{route.method} {route.path}", {"": b""})[what]
    before = running.engine.stats().steps
    running.backend.on_step = lambda _batch: time.sleep(0.002)
    with begin(running, route, body, 0.05 if ending is deadline else None) as connection:
        ending(connection, running, before)
        if ending is deadline and route.path not in GENERATES:
            connection.close()
        found = b"" if connection.fileno() < 0 else rest(connection)
    if ending is finish:
        assert found.startswith(b"HTTP/1.1 200"), found
        assert b'{"error"' not in found  # of a stream that was cut
    if ending is deadline and route.path in GENERATES and what != "drafts":
        assert b"time_limit" in found
    if route.path in GENERATES:
        assert ending is not error or not running.backend.fail_next  # the failure was this request's
        assert ending is not shutdown or b"shutdown" in found, found
    running.backend.on_step = lambda _batch: None
    until(lambda: ends_of_jobs(running) <= {"completed", "cancelled"}, 20)
    until(lambda: is_released(running), 20)
    running.backend.fail_next = False
    status, answer = complete(running.address, max_tokens=3)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)


def test_nothing_is_left_on_the_disk_but_what_was_kept(running):
    """Of uploads whose client went away."""
    files = running.app.door.jobs.files
    kept = {file.id for file in files.files(Access.open_to_all().identify([]).tenant)}
    assert kept
    found = {path.name for path in files._directory.iterdir()}
    assert found == {name for id in kept for name in (id, f"{id}.json")}
