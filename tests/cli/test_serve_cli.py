"""`motet serve`, `motet keys`, `motet audit` as an operator types them, with a server in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from helpers.servers import until
from motet.bench.lib.certificates import Authority
from motet.cli import app
from motet.export.bundle_writer import export_bundle
from motet.runtime import errors
from motet.runtime.client.client import Client
from motet.runtime.client.connection import Connection
from motet.runtime.serve import run as run_module
from motet.runtime.serve.settings import Settings
from typer.testing import CliRunner

pytestmark = pytest.mark.alone  # servers in processes

SHORT = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True}
CALL = ["begin", "call"]


@pytest.fixture(scope="module")
def bundle(tiny_model_dir, tmp_path_factory):
    return export_bundle(tiny_model_dir("llama"), tmp_path_factory.mktemp("serve") / "tiny", graphs=False)


def motet(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@contextmanager
def server(bundle, *options, environment=None):
    """A `motet serve` process and its address."""
    command = [
        sys.executable,
        "-m",
        "motet.cli",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--threads",
        "1",
        *map(str, options),
    ]
    variables = {**os.environ, **(environment or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("motet serves"), line + process.stderr.read()
            yield process, line.split()[-1]
        finally:
            process.kill()


def test_keys_are_made_shown_and_revoked(tmp_path):
    file = tmp_path / "keys.json"
    key = motet(
        "keys", "add", file, "--tenant", "acme", "--role", "infer", "--role", "admin", "--days", "7"
    ).stdout.strip()
    assert key.startswith("motet-")
    shown = motet("keys", "list", file).stdout
    assert "acme" in shown and "admin" in shown and key.split("-", 2)[2] not in shown
    key_id = key.split("-")[1]
    assert motet("keys", "revoke", file, key_id).exit_code == 0
    assert json.loads(file.read_text())["keys"][0]["revoked"] > 0
    assert isinstance(motet("keys", "revoke", file, "nothing").exception, errors.NotFoundError)


def test_settings_are_printed(tmp_path):
    (tmp_path / "motet.toml").write_text("[server]\nport = 7\nlame_duck = 3.0\n[engine]\nmax_num_seqs = 2\n")
    printed = motet("serve", "--config", tmp_path / "motet.toml", "--port", 9, "--print-config")
    assert printed.exit_code == 0, printed.output
    (tmp_path / "printed.toml").write_text(printed.stdout)
    settings = Settings.load(tmp_path / "printed.toml")
    assert (settings.server.port, settings.server.lame_duck, settings.engine.max_num_seqs) == (9, 3.0, 2)
    assert isinstance(motet("serve", "--host", "0.0.0.0", "x").exception, errors.ConfigError)
    assert isinstance(motet("serve").exception, errors.ConfigError)


def test_a_server_with_everything(bundle, tmp_path, capfd):
    """TLS, keys, an audit log, JSON logs; a second terminal asks; SIGTERM ends it."""
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    keys = tmp_path / "keys.json"
    key = motet("keys", "add", keys, "--tenant", "acme").stdout.strip()
    options = ("--tls-cert", pair.certificate, "--tls-key", pair.key, "--keys", keys, "--audit", tmp_path / "audit")
    with server(bundle, *options, "--log-format", "json", environment={"MOTET_SERVE_MONITOR_PORT": "0"}) as (
        process,
        address,
    ):
        asked = subprocess.run(
            [
                sys.executable,
                "-m",
                "motet.cli",
                "generate",
                "hi",
                "--address",
                address,
                "--ca",
                str(authority.path),
                "--max-tokens",
                "3",
            ],
            env={**os.environ, "MOTET_KEY": key},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert asked.returncode == 0, asked.stderr
        with Client(Connection(address, ca=authority.path)) as client, pytest.raises(errors.UnauthenticatedError):
            client.complete("x", **SHORT)
        with Client(Connection(address, key, ca=authority.path)) as client:
            assert len(client.complete("x", **SHORT)[0].token_ids) == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        logged = [json.loads(line) for line in process.stderr.read().splitlines()]
    calls = [line for line in logged if line["logger"] == "motet.calls"]
    assert [line["status"] for line in calls] == ["ok", "UnauthenticatedError", "ok"]
    verified = motet("audit", "verify", tmp_path / "audit")
    assert "records 1 to 7 are whole" in verified.stdout and "not ended" not in verified.stdout
    records = [json.loads(line) for line in motet("audit", "show", tmp_path / "audit").stdout.splitlines()]
    assert [record["event"] for record in records] == ["start", *CALL, "refusal", *CALL, "stop"]
    subject = f"acme/key:{key.split('-')[1]}"
    assert motet("audit", "erase", tmp_path / "audit", "--subject", subject).exit_code == 0
    assert "records 1 to 8" in motet("audit", "verify", tmp_path / "audit").stdout
    assert "0 records removed" in motet("audit", "prune", tmp_path / "audit", "--before", "2020-01-01").stdout


def test_what_a_killed_server_was_doing_is_recorded(bundle, tmp_path):
    with server(bundle, "--audit", tmp_path / "audit") as (process, address), Client(address) as client:
        assert len(client.complete("x", **SHORT)[0].token_ids) == 3
        stream = client.generate("y", request_id="mi\nne", max_tokens=1000, ignore_eos=True)
        next(iter(stream))
        [file] = (tmp_path / "audit").glob("audit-*.jsonl")
        until(lambda: file.read_text().count('"begin"') == 2)
        process.kill()
        process.wait(30)
    shown = motet("audit", "verify", tmp_path / "audit").stdout.splitlines()
    assert "records 1 to 4 are whole" in shown[0]  # start, a call, the begin of another
    assert len(shown) == 2 and shown[1].startswith("not ended: seq=4 time=")
    assert (
        ' method="generate" ' in shown[1] and r' request_id="mi\nne" bundle=' in shown[1]
    )  # the caller's text is no line
    with server(bundle, "--audit", tmp_path / "audit") as (process, address):  # it goes on
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert len(motet("audit", "verify", tmp_path / "audit").stdout.splitlines()) == 2


def test_a_server_whose_audit_log_fails_may_be_started_again(bundle, tmp_path, monkeypatch):
    """It ends with exit code 1, not with 2, which says that starting it again would not help."""

    class Failing(run_module.AuditLog):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            full = errors.UnavailableError("the disk is full")
            threading.Timer(0.5, lambda: setattr(self, "failure", full)).start()

    monkeypatch.setattr(run_module, "AuditLog", Failing)
    settings = Settings.load(None, {}, server={"port": 0, "audit": tmp_path / "audit"}, engine={"threads": 1})
    with pytest.raises(errors.MotetError, match="the disk is full") as caught:
        run_module.serve(bundle, settings)
    assert caught.value.exit_code == 1


def test_fifty_clients_are_killed(bundle):
    """Their connections break in the middle of an answer; within a second all blocks are free and the server answers."""
    program = """
import sys, threading
from motet.runtime.client.client import Client

def one():
    for delta in Client(sys.argv[1]).generate("x", max_tokens=400, ignore_eos=True):
        print(".", flush=True)

threads = [threading.Thread(target=one) for _ in range(25)]
for thread in threads:
    thread.start()
"""
    with server(bundle, "--max-num-seqs", "8") as (_process, address):
        clients = [
            subprocess.Popen([sys.executable, "-c", program, address], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        try:
            for each in clients:
                assert each.stdout.readline().startswith(".")
            time.sleep(0.2)
        finally:
            for each in clients:
                each.kill()
        killed = time.monotonic()
        with Client(address) as client:
            answer = client.complete("y", **SHORT)[0]
            assert len(answer.token_ids) == 3
            from motet.proto import admin_pb2

            while (model := client._admin.GetModel(admin_pb2.GetModelRequest())).running or model.waiting:
                assert time.monotonic() - killed < 2
                time.sleep(0.02)
        for each in clients:
            each.wait(10)
            each.stdout.close()


def test_sigterm_and_sigkill(bundle):
    """Those that run finish; the process ends soon after, and leaves no child."""
    with server(bundle, "--max-num-seqs", "6", "--drain-timeout", "30") as (process, address):
        results = []

        def one(index):
            with Client(address) as client:
                try:
                    results.append(
                        len(client.complete(f"{index}", max_tokens=300, temperature=0.0, ignore_eos=True)[0].token_ids)
                    )
                except errors.UnavailableError:
                    results.append(0)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(10)]
        for thread in threads:
            thread.start()
        time.sleep(0.15)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        for thread in threads:
            thread.join()
        assert set(results) <= {0, 300} and results.count(300) >= 1
