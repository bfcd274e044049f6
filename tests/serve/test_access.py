"""Nobody calls a method without a right to it. The methods are read from the descriptors, so one that is added tomorrow is
covered."""

from __future__ import annotations

import time

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.fake_backend import FakeBackend, make_engine
from helpers.servers import serving
from motet.proto import admin_pb2, batch_pb2, inference_pb2
from motet.runtime import errors
from motet.runtime.client.client import Client
from motet.runtime.client.connection import Connection
from motet.runtime.serve.calls import CallLog
from motet.runtime.serve.grpc.gate import ROLES
from motet.runtime.trust import keys as keys_module
from motet.runtime.trust.access import Access
from motet.runtime.trust.identity import Role, anonymous
from motet.runtime.trust.keys import KeyFile, add_key, read_keys, revoke_key

SERVICES = [
    service
    for module in (inference_pb2, admin_pb2, batch_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
METHODS = {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
CODES = grpc.StatusCode


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def keys(path):
    """Role → a key with that role alone, and `none`, expired, revoked ones."""
    found = {str(role): add_key(path, "acme", [role]) for role in Role}
    found["expired"] = add_key(path, "acme", list(Role), lifetime_s=1e-9)
    found["revoked"] = add_key(path, "acme", list(Role))
    revoke_key(path, read_keys(path)[-1].id)
    return found


@pytest.fixture(scope="module")
def engine(tokenizer):
    with make_engine(tokenizer, FakeBackend(num_blocks=64)) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine, keys, path):
    with serving(engine, Access(KeyFile(path)), with_reflection=True) as running:
        yield running.address


def call(address, method, metadata=(), content=b""):
    """The status of a call with an empty message (or these bytes), streamed or not."""
    with grpc.insecure_channel(address) as channel:
        kind = channel.unary_stream if is_stream(method) else channel.unary_unary
        try:
            answer = kind(method)(content, metadata=metadata, timeout=20)
            list(answer) if is_stream(method) else None
        except grpc.RpcError as error:
            return error.code()
    return CODES.OK


def is_stream(method):
    return method in METHODS and METHODS[method].server_streaming


def bearer(key):
    return (("authorization", f"Bearer {key}"),)


def test_the_table_is_complete():
    assert {name for name in ROLES if name.startswith("/motet.v1.")} == set(METHODS)
    assert REFLECTION in ROLES
    assert all(roles <= set(Role) and roles for roles in ROLES.values())


STRANGERS = {
    "nothing": lambda keys: (),
    "empty": lambda keys: (("authorization", ""),),
    "another scheme": lambda keys: (("authorization", f"Basic {keys['admin']}"),),
    "two": lambda keys: bearer(keys["admin"]) * 2,
    "wrong": lambda keys: bearer(keys["admin"][:-1] + ("A" if keys["admin"][-1] != "A" else "B")),
    "an id alone": lambda keys: bearer("-".join(keys["admin"].split("-")[:2])),
    "expired": lambda keys: bearer(keys["expired"]),
    "revoked": lambda keys: bearer(keys["revoked"]),
    "long": lambda keys: bearer("x" * 5000),
}


@pytest.mark.parametrize("method", [*METHODS, REFLECTION, "/motet.v1.Inference/Nothing", "/other.Service/Method"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_refused_everywhere(address, keys, method, stranger):
    assert call(address, method, STRANGERS[stranger](keys)) is CODES.UNAUTHENTICATED


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "/motet.v1.Admin/Drain"])
def test_roles(address, keys, method, role):
    found = call(address, method, bearer(keys[role]))
    if role in ROLES[method]:
        assert found not in (CODES.UNAUTHENTICATED, CODES.PERMISSION_DENIED)
    else:
        assert found is CODES.PERMISSION_DENIED


def test_only_admins_drain(tokenizer, path, keys):
    with make_engine(tokenizer) as engine, serving(engine, Access(KeyFile(path))) as running:
        for role in set(Role) - {Role.ADMIN}:
            assert call(running.address, "/motet.v1.Admin/Drain", bearer(keys[role])) is CODES.PERMISSION_DENIED
        assert not running.service.is_leaving
        assert call(running.address, "/motet.v1.Admin/Drain", bearer(keys["admin"])) is CODES.OK
        assert running.service.is_leaving


def test_health_is_open(address):
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_a_method_in_no_table_is_closed(address, keys, monkeypatch):
    method = "/motet.v1.Admin/ListModels"
    assert call(address, method, bearer(keys["infer"])) is CODES.OK
    monkeypatch.delitem(ROLES, method)
    assert call(address, method, bearer(keys["infer"])) is CODES.PERMISSION_DENIED


def test_the_client_shows_its_key(address, keys):
    with Client(Connection(address, key=keys["infer"])) as client:
        assert len(client.complete("x", max_tokens=3, ignore_eos=True, temperature=0.0)[0].token_ids) == 3
        with pytest.raises(errors.PermissionDeniedError, match="needs the role admin"):
            client.drain()
    with Client(address) as client:
        assert client.is_serving()
        with pytest.raises(errors.UnauthenticatedError, match="motet keys add"):
            client.complete("x")
        with pytest.raises(errors.UnauthenticatedError):
            client.models()


def test_an_error_does_not_say_why(address, keys):
    """Who guesses must not learn whether a key exists."""
    texts = set()
    for stranger in ("wrong", "an id alone", "expired", "revoked"):
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/motet.v1.Admin/ListModels")(b"", metadata=STRANGERS[stranger](keys))
        texts.add(caught.value.details())
    assert len(texts) == 1


def test_a_key_that_expires_ends_at_once(address, keys, path, monkeypatch):
    key = add_key(path, "acme", [Role.INFER], lifetime_s=3600)
    assert call(address, "/motet.v1.Admin/ListModels", bearer(key)) is CODES.OK  # the file was read again
    now = time.time()
    monkeypatch.setattr(keys_module.time, "time", lambda: now + 3601)
    assert call(address, "/motet.v1.Admin/ListModels", bearer(key)) is CODES.UNAUTHENTICATED


def test_a_fault_in_the_gate_closes_it(engine, caplog):
    class Broken(Access):
        def identify(self, authorization):
            raise RuntimeError("/etc/secret holds 12345")

    broken = Broken(anonymous=anonymous(may_drain=True))
    with serving(engine, broken) as running, Client(running.address) as client:
        with pytest.raises(errors.MotetError, match=r"internal error [0-9a-f]{12}"):
            client.drain()
        assert not running.service.is_leaving
        assert client.is_serving()
    assert "/etc/secret" in caplog.text


def test_refused_messages_are_recorded(engine, caplog):
    caplog.set_level("INFO", "motet.calls")
    with serving(engine, service={"sinks": [CallLog()]}) as running:
        wrong = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="x"), sampling={"temperature": -1.0})
        for method in ("Generate", "Complete"):
            assert call(running.address, f"/motet.v1.Inference/{method}", content=wrong.SerializeToString()) is (
                CODES.INVALID_ARGUMENT
            )
    assert [record.fields["method"] for record in caplog.records if record.name == "motet.calls"] == [
        "generate",
        "complete",
    ]


def test_strangers_cost_nothing(address, engine, keys, monkeypatch):
    """Their messages are not even parsed."""
    seen = []
    factory = message_factory.GetMessageClass(
        descriptor_pool.Default().FindMessageTypeByName("motet.v1.GenerateRequest")
    )
    monkeypatch.setattr(engine.tokenizer, "encode", lambda *_a, **_k: seen.append(1))
    message = factory(prompt={"text": "x" * 100_000}).SerializeToString()
    for content in (message, b"\xff\xff\xff"):
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/motet.v1.Inference/Complete")(content, metadata=STRANGERS["wrong"](keys))
        assert caught.value.code() is CODES.UNAUTHENTICATED
    assert not seen
