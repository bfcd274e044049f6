"""The command: what each subcommand leaves behind; exit code 2 and one line for what a user got wrong."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from motet.cli import main
from motet.export.bundle_writer import export_bundle
from motet.finetune.data.dataset import heldout_token_ids
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.members.tail import read_tail
from motet.runtime.client.client import Client
from motet.runtime.engine.engine import Engine
from motet.runtime.model.bundle import Bundle
from motet.runtime.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bundle(tiny_model_dir, tmp_path_factory):
    return export_bundle(tiny_model_dir("llama"), tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"prompt": f"say {i}", "completion": f"the answer is {i % 3}"} for i in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def motet(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "motet.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def here(monkeypatch, capsys):
    """(arguments, stdin) → (exit code, stdout, stderr) of a command in this process, which has torch already."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["motet", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def succeeded(here):
    """(arguments, stdin) → (stdout, stderr) of a command that must end with 0."""

    def run(*arguments, stdin=""):
        code, out, err = here(*arguments, stdin=stdin)
        assert code == 0, err
        return out, err

    return run


@pytest.fixture
def refused(here):
    """arguments → the one line on stderr of a command that must end with 2."""

    def run(*arguments):
        code, _, err = here(*arguments)
        assert code == 2, err
        (line,) = err.strip().splitlines()
        return line

    return run


def greedy_answer(bundle, message, max_tokens):
    """The text that the engine gives for a chat message, temperature 0."""
    with Engine.from_bundle(bundle, EngineConfig()) as engine:
        prompt = tuple(engine.tokenizer.encode_chat([{"role": "user", "content": message}]))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return engine.complete([Request("r", (prompt,), engine.model.default_ensemble, sampling)])[0][0].text


@pytest.mark.slow
def test_export_measures_what_it_wrote(tiny_model_dir, tmp_path, succeeded):
    model_dir, out = tiny_model_dir("llama"), tmp_path / "exported"
    lines = succeeded("export", model_dir, out)[0].splitlines()
    assert lines[0] == str(out)
    assert Bundle.load(out).members == ("base",)
    (row,) = [
        re.split(r"\W* {2,}\W*|\s*[│┃]\s*", line.strip("│┃ ")) for line in lines if line.strip("│┃ ").startswith("base")
    ]
    _, num_tokens, nll, _, kl, top1 = row
    chunks, losses = heldout_token_ids(Tokenizer.from_dir(model_dir), 4096, context=512), []
    decoder = Decoder.from_dir(model_dir)
    with torch.no_grad():
        for chunk in chunks:
            logprobs = decoder(torch.tensor([chunk[:-1]]))[0].log_softmax(-1)
            losses.append(-logprobs.gather(1, torch.tensor(chunk[1:])[:, None])[:, 0])
    expected = torch.cat(losses)
    assert int(num_tokens.replace(",", "")) == len(expected)
    assert float(nll) == pytest.approx(float(expected.mean()), abs=0.002)
    assert 0 < float(kl) < 0.1
    assert 50 < float(top1.rstrip("%")) < 100


@pytest.mark.slow
def test_a_search_of_bundles(tiny_model_dir, data, tmp_path, succeeded, refused):
    """A time that is too short for a second one makes one."""
    out = tmp_path / "search"
    options = (
        "--search",
        0.0001,
        "--questions",
        data,
        "--max-kl",
        0.5,
        "--calibration-tokens",
        600,
        "--method",
        "search",
    )
    printed, told = succeeded("export", tiny_model_dir("llama"), out, *options)
    chosen = Path(printed.strip())
    assert chosen.parent == out and chosen.name.startswith("000-search-") and Bundle.load(chosen).members == ("base",)
    assert f"chosen: {chosen.name}, the smallest with a KL of at most 0.5" in " ".join(told.split())
    assert (out / "report.html").is_file()
    model_dir = tiny_model_dir("llama")
    assert "leave out --bits, --parity" in refused("export", model_dir, out, "--search", 1, "--bits", 4, "--no-parity")
    assert "add --search" in refused("export", model_dir, out, "--questions", data)
    assert "above 0, got nan" in refused("export", model_dir, out, "--search", "nan")
    assert "a search of another model or with other settings" in refused("export", model_dir, out, "--search", 1)


@pytest.mark.slow
def test_from_tune_to_a_mix(tiny_model_dir, data, tmp_path, succeeded):
    """A tail is trained, exported beside the base, and answers in a mix of its own."""
    model_dir, tail, out = tiny_model_dir("llama"), tmp_path / "tail", tmp_path / "bundle"
    settings = ("--examples", 16, "--validation-examples", 4, "--epochs", 2, "--lr", "3e-3", "--layers", 1)
    told, _ = succeeded("tune", model_dir, "--data", data, "--out", tail, "--cache", tmp_path / "cache", *settings)
    stored, weights = read_tail(tail)
    before, after = (stored["metrics"][f"validation_loss_{when}"] for when in ("before", "after"))
    assert after < before
    assert told.splitlines()[-1] == f"{tail}: validation loss {before:.3f} → {after:.3f} nats per token"
    assert {name.split(".")[2] for name in weights if ".layers." in name} == {"3"}
    succeeded(
        "export",
        model_dir,
        out,
        "--tail",
        "base",
        "--tail",
        f"tuned={tail}",
        "--mix",
        "base=0.25,tuned=0.75",
        "--no-parity",
    )
    members = Bundle.load(out).default_ensemble.members
    assert [(member.name, member.mix) for member in members] == [("base", 0.25), ("tuned", 0.75)]
    greedy = ("generate", "say 7", "--bundle", out, "--max-tokens", 12, "--temperature", 0)
    assert succeeded(*greedy)[0] == greedy_answer(out, "say 7", 12) + "\n"


@pytest.mark.slow
def test_search_and_fuse(tiny_model_dir, data, tmp_path, succeeded):
    model_dir, found = tiny_model_dir("llama"), tmp_path / "s"
    common = (model_dir, "--data", data, "--validation-examples", 4, "--cache", tmp_path / "cache", "--max-length", 100)
    told, _ = succeeded("search", *common, "--out", found, "--trials", 2, "--layers", 1, "--examples", 8, "--epochs", 1)
    values = [float(value) for value in re.findall(r"^trial \d/2: ([\d.]+) ", told, re.MULTILINE)]
    assert len(values) == 2
    assert f"best validation loss {min(values):.4f}" in told
    fused, _ = succeeded("fuse", *common, "--out", tmp_path / "f", "--search", found, "--test-examples", 4)
    command = fused.strip().splitlines()[-1]
    mix = json.loads((tmp_path / "f" / "fusion.json").read_text())["mix"]
    assert sum(mix.values()) == pytest.approx(1, abs=1e-9)
    arguments = command.replace("BUNDLE", str(tmp_path / "b")).split()[1:]
    succeeded(*arguments, "--no-parity")  # the command that it names works
    members = Bundle.load(tmp_path / "b").default_ensemble.members
    assert {member.name: member.mix for member in members if member.mix} == mix


def test_generate_streams_the_greedy_answer(bundle, succeeded):
    out, err = succeeded("generate", "hello", "--bundle", bundle, "--max-tokens", 8, "--temperature", 0)
    assert out == greedy_answer(bundle, "hello", 8) + "\n"
    assert "8 tokens" in err


def test_generate_with_a_context_mixes_the_only_member_with_itself(bundle, succeeded, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear all, the meeting is on Monday.")
    ask = ("generate", "When is it?", "--bundle", bundle, "--context", tmp_path / "letter.txt", "--max-tokens", 8)
    _, err = succeeded(*ask, "--temperature", 0)
    assert "8 tokens" in err


def test_a_turn_of_chat(bundle, succeeded):
    """One message and an empty line: the answer, then the end."""
    out, _ = succeeded("chat", "--bundle", bundle, "--max-tokens", 8, "--temperature", 0, stdin="hello\n\n")
    assert out == f"> {greedy_answer(bundle, 'hello', 8)}\n> "


def test_serve_answers_and_ends_when_told(bundle):
    command = [sys.executable, "-m", "motet.cli", "serve", str(bundle), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("motet serves 'tiny' (base) on 127.0.0.1:"), line + server.stderr.read()
            with grpc.insecure_channel(line.rsplit(" ", 1)[1].strip()) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                reply = health.Check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 0, server.stderr.read()
        finally:
            server.kill()


def test_what_is_asked_for_is_printed(bundle):
    options = ("--max-tokens", "3", "--temperature", "0", "--ignore-eos", "--n", "2", "--logprobs", "1")
    result = motet("generate", "hello", "--bundle", bundle, *options, "--member-logprobs", "--request-id", "mine")
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    tokens = [line for line in lines if line.startswith("token ")]
    assert len(tokens) == 6
    assert all("logprob -" in line and "best " in line and "members -" in line for line in tokens)
    assert sum(line.startswith("[mine: length, 3 tokens") for line in lines) == 2


@pytest.mark.slow
def test_users_mistakes(bundle, tmp_path, tiny_model_dir, refused):
    generate = ("generate", "hi", "--bundle", bundle)
    assert "sums to 0.5" in refused(*generate, "--mix", "base=0.5")
    assert "its members are" in refused(*generate, "--mix", "zz=1")
    assert "need space LOGITS" in refused(*generate, "--mix", "base=1.5,zz=-0.5", "--space", "probs")
    assert "name=coefficient" in refused(*generate, "--mix", "base:1")
    assert "temperature" in refused(*generate, "--temperature", "nan")
    assert "give --mix too" in refused(*generate, "--space", "probs")
    assert "give --context too" in refused(*generate, "--alpha", "0.5")
    assert "instead of --mix" in refused(*generate, "--mix", "base=1", "--context", bundle / "manifest.json")
    assert "'base' is there twice" in refused(*generate, "--mix", "base=1,base=0")
    assert "takes ID=NUMBER, got '5'" in refused(*generate, "--logit-bias", "5")
    assert "n must be an integer in 1…64, got 65" in refused(*generate, "--n", "65")
    assert "no bundle" in refused("generate", "hi", "--bundle", tmp_path / "none")
    assert "prompt is empty" in refused("generate", "", "--raw", "--bundle", bundle)
    assert "no file" in refused("summarise", tmp_path / "none", tmp_path / "out", "--bundle", bundle)
    assert "motet pull" in refused("tune", "nobody", "--data", "stdlib-code", "--out", tmp_path / "t")
    assert "no known model" in refused("pull", "nobody")
    assert "bits must be" in refused("export", tiny_model_dir("llama"), tmp_path / "b", "--bits", "7")
    assert "No such option" in refused("export", "--wrong")


@pytest.mark.slow
def test_malformed_data(tmp_path, tiny_model_dir, refused):
    data = tmp_path / "data.jsonl"
    for content, expected in (
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b"{\n", "not JSON"),
        (b'{"txt": 1}\n', "keys ['txt']"),
    ):
        data.write_bytes(content)
        message = refused("tune", tiny_model_dir("llama"), "--data", data, "--out", tmp_path / "t")
        assert "line 1" in message
        assert expected in message


def test_port_in_use(bundle, refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in refused("serve", bundle, "--port", taken.getsockname()[1])


def test_drain_lets_the_answer_end_and_then_the_server_ends(bundle):
    command = [sys.executable, "-m", "motet.cli", "serve", str(bundle), "--port", "0", "--allow-drain"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            with Client(line.rsplit(" on ", 1)[1].strip()) as client:
                deltas = client.generate("abc", max_tokens=300, temperature=0.0, ignore_eos=True)
                count = len(next(deltas).token_ids)
                client.drain()
                assert count + sum(len(delta.token_ids) for delta in deltas) == 300
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


@pytest.mark.slow
def test_wrong_family(tmp_path, refused):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "model family 'mamba'" in refused("export", tmp_path, tmp_path / "b")
