"""`motet batch` and `motet serve --http-port --state-dir`, as a user types them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import openai
import pytest
from motet.cli import app
from motet.export.bundle_writer import export_bundle
from motet.runtime import errors
from typer.testing import CliRunner

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # a bundle is exported, and served by a process


@pytest.fixture(scope="module")
def server(tiny_model_dir, tmp_path_factory):
    """(gRPC's address, HTTP's address) of a process that is told to end afterwards."""
    root = tmp_path_factory.mktemp("batch")
    bundle = export_bundle(tiny_model_dir("llama"), root / "tiny", graphs=False)
    command = [
        sys.executable,
        "-m",
        "motet.cli",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--http-port",
        "0",
        "--threads",
        "1",
    ]
    command += ["--state-dir", str(root / "state"), "--gateways"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            found = re.search(r" on (\S+:\d+), HTTP on (\S+:\d+)", process.stdout.readline())
            yield found[1], found[2]
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def motet(*arguments):
    return CliRunner().invoke(app, ["batch", *map(str, arguments)])


def submitted(server, *arguments):
    found = motet("submit", *arguments, "--address", server[0])
    assert found.exit_code == 0, found.output
    return found.stdout.strip()


def test_a_job_from_its_file_to_its_results(server, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": f"d{i}", "text": f"words {i} to shorten"}) + "\n" for i in range(5)))
    job = submitted(server, source, "--defaults", '{"max_summary_tokens": 4, "instruction": "short: "}')
    watched = motet("watch", job, "--address", server[0])
    assert (watched.exit_code, watched.stdout.strip()) == (0, "done: 5 done, 0 failed, of 5")
    assert motet("results", job, "--out", out, "--address", server[0]).exit_code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["custom_id"] for line in lines} == {f"d{i}" for i in range(5)}
    assert all(line["response"]["body"]["object"] == "summary" for line in lines)
    assert isinstance(motet("results", job, "--out", out, "--address", server[0]).exception, errors.ConfigError)
    assert job in motet("list", "--address", server[0]).stdout
    assert motet("cancel", job, "--address", server[0]).stdout.strip() == "done"
    assert motet("delete", job, "--address", server[0]).exit_code == 0
    assert isinstance(motet("watch", job, "--address", server[0]).exception, errors.NotFoundError)


def test_lines_of_openais_batch_api_and_failures(server, tmp_path):
    source = tmp_path / "in.jsonl"
    body = {"prompt": "hello", "max_tokens": 3}
    lines = [{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}]
    lines.append({"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": body | {"temperature": -1}})
    source.write_text("\n".join(map(json.dumps, lines)))
    job = submitted(server, source)
    watched = motet("watch", job, "--address", server[0])
    assert (watched.exit_code, watched.stdout.strip()) == (1, "done: 1 done, 1 failed, of 2")
    printed = [json.loads(line) for line in motet("results", job, "--address", server[0]).stdout.splitlines()]
    assert sorted((line["custom_id"], line["response"]["status_code"]) for line in printed) == [("a", 200), ("b", 400)]


def test_what_is_refused(server, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"custom_id": "a", "url": "/v1/completions", "body": {}}\n')
    other = motet("submit", source, "--endpoint", "/v1/embeddings", "--address", server[0])
    assert isinstance(other.exception, errors.ConfigError)
    for defaults in ("[1]", "{"):
        assert isinstance(motet("submit", source, "--defaults", defaults).exception, errors.ConfigError)
    assert isinstance(motet("submit", tmp_path / "nothing").exception, errors.NotFoundError)
    source.write_text('{"id": "a"}\n')
    assert isinstance(motet("submit", source, "--address", server[0]).exception, errors.DataError)


def test_http_answers_on_its_port(server):
    client = openai.OpenAI(base_url=f"http://{server[1]}/v1", api_key="none", max_retries=0)
    [model] = [one.id for one in client.models.list()]
    found = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}], max_tokens=3)
    assert found.usage.completion_tokens <= 3
