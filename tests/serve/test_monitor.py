"""HTTP for those who watch: which paths there are, who may read them, and what stands in the metrics."""

from __future__ import annotations

import asyncio
import configparser
import json
import re
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from helpers.callers import caller
from helpers.fake_backend import hold_first_step
from helpers.servers import serving, until
from motet.options import KEY_VARIABLE
from motet.runtime import errors
from motet.runtime.api.request import Ensemble, GenerateRequest, Member, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.client.client import Client
from motet.runtime.serve.audited import AuditSink
from motet.runtime.serve.calls import Call, Caller
from motet.runtime.serve.metrics import CallMetrics, engine_registry
from motet.runtime.serve.monitor import Monitor
from motet.runtime.serve.service import Service
from motet.runtime.serve.settings import Settings
from motet.runtime.serve.tracing import Tracer
from motet.runtime.trust.access import Access
from motet.runtime.trust.audit.chain import verify
from motet.runtime.trust.audit.reader import records
from motet.runtime.trust.audit.writer import AuditLog
from motet.runtime.trust.identity import Role
from motet.runtime.trust.keys import KeyFile, add_key
from motet.top_cli import _quantile, top

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"


def get(port, path, key=None):
    """(status, body)"""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def monitored(engine, tmp_path):
    """A running server, its monitor, and a key of each role."""
    path = tmp_path / "keys.json"
    keys = {role: add_key(path, "acme", [role]) for role in Role}
    access = Access(KeyFile(path))
    with serving(engine, access) as running:
        monitor = Monitor(running.service, engine_registry(engine), access)
        yield running, monitor, keys
        monitor.close()


def ask(**fields):
    return GenerateRequest("hello", sampling=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True), **fields)


def test_paths_and_roles(monitored):
    running, monitor, keys = monitored
    assert get(monitor.port, "/livez") == get(monitor.port, "/readyz") == (200, "OK\n")
    for path in ("/", "/metrics/", "/metrics?x", "/debug", "/../etc/passwd", "/livez/x"):
        assert get(monitor.port, path)[0] == 404
    assert get(monitor.port, "/metrics")[0] == get(monitor.port, "/metrics", "wrong")[0] == 401
    for role, key in keys.items():
        assert get(monitor.port, "/metrics", key)[0] == (200 if role is Role.MONITOR else 403)
    running.call(running.service.leave)
    assert get(monitor.port, "/readyz")[0] == 503
    assert get(monitor.port, "/livez")[0] == 200


def test_hostile_connections(monitored):
    _, monitor, _ = monitored
    idle = [socket.create_connection(("127.0.0.1", monitor.port)) for _ in range(40)]  # they say nothing
    for each in idle:
        each.close()
    for content in (
        b"\xff" * 1000 + b"\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", monitor.port)) as connection:
            connection.sendall(content)
            assert b"200" not in connection.recv(100)
    assert get(monitor.port, "/livez")[0] == 200


def test_a_port_that_is_taken(monitored, engine):
    running, monitor, _ = monitored
    with pytest.raises(errors.PortInUseError, match="choose another port"):
        Monitor(running.service, engine_registry(engine), Access.open_to_all(), port=monitor.port)


def test_calls_are_counted_by_tenant(engine):
    registry = engine_registry(engine)

    async def run():
        service = Service(engine, sinks=[CallMetrics(registry)])
        mix = Ensemble((Member("a", 0.5), Member("b", 0.5)))
        await service.complete(ask(), caller("acme"))
        await service.complete(ask(ensemble=mix), caller("acme"))
        with pytest.raises(errors.InvalidRequestError):
            await service.complete(GenerateRequest("x" * 500), caller("other"))

    asyncio.run(run())

    def value(name, **labels):
        return registry.get_sample_value(name, labels)

    assert value("motet_calls_total", method="complete", status="ok", tenant="acme") == 2
    assert value("motet_calls_total", method="complete", status="ContextLengthError", tenant="other") == 1
    assert value("motet_tenant_tokens_total", tenant="acme", kind="completion") == 8
    assert value("motet_member_calls_total", member="b") >= 1
    assert value("motet_call_first_token_seconds_count") == 2
    assert value("motet_inter_token_seconds_count") == 2


def test_calls_are_audited(engine, tmp_path):
    async def run():
        with AuditLog(tmp_path / "audit", with_content=True) as audit:
            service = Service(engine, sinks=[AuditSink(audit, "d1gest")])
            await service.complete(ask(request_id="mine"), caller("acme", subject="key:7"))
            with pytest.raises(errors.InvalidRequestError):
                await service.complete(GenerateRequest("x" * 500), caller("acme"))
            service.calls.refused("/motet.v1.Admin/Drain", "ipv4:1.2.3.4:5", errors.UnauthenticatedError("no"))
            audit.failure = errors.UnavailableError("the disk is full")
            with pytest.raises(errors.UnavailableError, match="the disk is full"):
                await service.complete(ask(), caller("acme"))
            assert engine.is_idle

    asyncio.run(run())
    begun, done, begun_wrong, wrong, refused = records(tmp_path / "audit")
    assert (begun["event"], begun["method"], begun["tenant"], begun["subject"]) == (
        "begin",
        "complete",
        "acme",
        "key:7",
    )
    assert (begun["bundle"], begun["request_id"], begun["key"]) == ("d1gest", "mine", done["key"])
    assert "status" not in begun and "prompt_hmac" not in begun and begun_wrong["key"] == wrong["key"] != done["key"]
    assert (done["method"], done["tenant"], done["subject"], done["bundle"]) == ("complete", "acme", "key:7", "d1gest")
    assert (done["status"], done["request_id"], done["completion_tokens"]) == ("ok", "mine", 4)
    assert json.loads(done["prompt"]) == [list(b"hello")] or done["prompt"].startswith("[[")
    assert len(done["answer"]) > 0 and "hello" not in json.dumps({k: v for k, v in done.items() if k != "answer"})
    assert "temperatures" not in done and done["mix"] == {"a": 1.0}
    assert wrong["status"] == "ContextLengthError"
    assert (refused["event"], refused["status"]) == ("refusal", "UnauthenticatedError")
    assert (verify(tmp_path / "audit").last, verify(tmp_path / "audit").unended) == (5, ())


def test_temperatures_of_members_are_audited(engine, tmp_path):
    async def run():
        with AuditLog(tmp_path / "audit") as audit:
            ensemble = Ensemble((Member("a", 0.5, temperature=1.5), Member("b", 0.5)))
            service = Service(engine, sinks=[AuditSink(audit, "d1gest")])
            await service.complete(ask(ensemble=ensemble), caller("acme"))

    asyncio.run(run())
    _, done = records(tmp_path / "audit")
    assert (done["mix"], done["temperatures"]) == ({"a": 0.5, "b": 0.5}, {"a": 1.5})


def test_mix_and_temperatures_are_of_the_same_entries_of_members():
    """One that sees two views has two entries."""
    members = (Member("a", 0.75, temperature=2.0), Member("a", 0.25, view=1))
    call = Call("complete", caller("acme"), "fake")
    call.submitted(Request("r", ((1,), (2,)), Ensemble(members)))
    assert (call.mix, call.temperatures) == ({"a": 0.25}, {})
    call.submitted(Request("r", ((1,), (2,)), Ensemble(members[::-1])))
    assert (call.mix, call.temperatures) == ({"a": 0.75}, {"a": 2.0})


def test_a_call_is_recorded_before_it_is_answered(engine, backend, tmp_path):
    """What a server does is in the log while it does it."""
    begun, go = hold_first_step(backend)
    with (
        AuditLog(tmp_path / "audit") as audit,
        serving(engine, service={"sinks": [AuditSink(audit, "d1gest")]}) as running,
        Client(running.address) as client,
    ):
        stream = client.generate("hello", request_id="mine", max_tokens=4, temperature=0.0)
        reader = threading.Thread(target=list, args=(stream,))
        reader.start()
        assert begun.wait(20)
        audit.flush()
        [open_call] = verify(tmp_path / "audit").unended
        assert (open_call["method"], open_call["request_id"], open_call["bundle"]) == ("generate", "mine", "d1gest")
        go.set()
        reader.join(20)
        until(lambda: running.service._quotas.num_open == 0)
    assert verify(tmp_path / "audit").unended == ()


def test_an_audit_log_that_fails_takes_the_server_out_of_service(engine, tmp_path):
    with (
        AuditLog(tmp_path / "audit") as audit,
        serving(engine, service={"sinks": [AuditSink(audit, "")]}) as running,
        Client(running.address) as client,
    ):
        assert client.is_serving()
        audit.failure = errors.UnavailableError("the disk is full")
        until(lambda: not client.is_serving())
        assert running.service.failure is audit.failure


def test_strangers_do_not_fill_the_disk(tmp_path):
    with AuditLog(tmp_path / "audit") as audit:
        sink = AuditSink(audit, "")
        for _ in range(500):
            sink.on_refusal("/" + "x" * 9000, "ipv4:1.2.3.4:5", errors.UnauthenticatedError("no"), None)
        sink._second = -1  # a second later
        sink.on_refusal("/x", "ipv4:1.2.3.4:5", errors.UnauthenticatedError("no"), None)
    found = list(records(tmp_path / "audit"))
    assert 20 < len(found) <= 61 and found[-1]["left_out"] >= 440
    assert len(found[0]["method"]) == 100


def test_names_that_are_invented_are_no_series(engine):
    registry = engine_registry(engine)

    async def run():
        service = Service(engine, sinks=[CallMetrics(registry)])
        for index in range(20):
            with pytest.raises(errors.InvalidEnsembleError):
                await service.complete(ask(ensemble=Ensemble((Member(f"invented-{index}", 1.0),))), caller("a"))

    asyncio.run(run())
    names = [s.labels["member"] for f in registry.collect() for s in f.samples if s.name == "motet_member_calls_total"]
    assert not any(name.startswith("invented") for name in names)


def test_traces(engine):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import StatusCode

    exporter = InMemorySpanExporter()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def run():
        with Tracer(exporter) as tracer:
            service = Service(engine, sinks=[tracer])
            who = caller("acme").identity
            await service.complete(ask(), Caller(who, parent))
            with pytest.raises(errors.InvalidRequestError):
                await service.complete(GenerateRequest("x" * 500), Caller(who, "garbage"))
            await service.tokenize("no span", Caller(who))

    asyncio.run(run())
    good, bad = exporter.get_finished_spans()
    assert format(good.context.trace_id, "032x") == parent.split("-")[1]
    assert format(good.parent.span_id, "016x") == parent.split("-")[2]
    assert good.attributes["gen_ai.usage.output_tokens"] == 4
    assert good.attributes["gen_ai.request.max_tokens"] == 4
    assert good.attributes["motet.tenant"] == "acme"
    assert [event.name for event in good.events] == ["admitted", "first_token"]
    assert good.start_time <= good.events[1].timestamp <= good.end_time
    assert bad.parent is None and bad.status.status_code is StatusCode.ERROR
    assert bad.attributes["error.type"] == "ContextLengthError"


# ---- what others build on these names --------------------------------------------------------------------------------


def test_the_dashboard_asks_for_series_that_there_are(engine):
    """Every name in examples/deploy/grafana.json is exported."""
    registry = engine_registry(engine)
    CallMetrics(registry)
    known = set()
    for family in registry.collect():
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        known |= {family.name + end for end in ends}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"motet_[a-z_]+", target["expr"])
    }
    assert len(asked) > 12
    assert asked <= known


def test_the_files_for_deployment_fit_together():
    settings = Settings.load(DEPLOY / "motet.toml")
    deployment, _service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] > settings.server.lame_duck + settings.server.drain_timeout
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": settings.server.port, "monitor": settings.server.monitor_port}
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["securityContext"]["readOnlyRootFilesystem"] and pod["securityContext"]["runAsNonRoot"]
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "motet.service")
    assert int(unit["Service"]["TimeoutStopSec"]) > settings.server.lame_duck + settings.server.drain_timeout
    assert "USER 10001" in (DEPLOY / "Containerfile").read_text()


def test_top(engine, monitored, monkeypatch, capsys):
    _, monitor, keys = monitored
    CallMetrics(monitor.registry).on_call(
        Call("complete", caller("acme"), "tiny", prompt_tokens=5, completion_tokens=2)
    )
    address = f"127.0.0.1:{monitor.port}"
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(errors.UnauthenticatedError, match="role monitor"):
        top(address, interval=0.1, once=True)
    monkeypatch.setenv(KEY_VARIABLE, keys[Role.MONITOR])
    top(address, interval=0.1, once=True)
    shown = capsys.readouterr().out
    assert "running / waiting" in shown and "acme" in shown
    with pytest.raises(errors.ConfigError, match="unencrypted"):
        top("example.org:1", interval=0.1, once=True)
    with pytest.raises(errors.ConfigError, match="give --ca too"):
        top(address, cert=DEPLOY / "motet.toml", interval=0.1, once=True)
    with pytest.raises(errors.UnavailableError, match="--monitor-port"):
        top("127.0.0.1:1", interval=0.1, once=True)


def test_quantiles_are_of_the_new_calls():
    def series(*counts):
        return {("x_bucket", (("le", le),)): count for le, count in zip(("0.1", "1.0", "+Inf"), counts)}

    assert _quantile(series(0, 0, 0), series(9, 10, 10), "x", 0.5) == "≤ 100 ms"
    assert _quantile(series(9, 10, 10), series(9, 11, 11), "x", 0.5) == "≤ 1000 ms"
    assert _quantile(series(9, 10, 10), series(9, 10, 11), "x", 0.5) == "longer"
    assert _quantile(series(1, 1, 1), series(1, 1, 1), "x", 0.5) == "–"
