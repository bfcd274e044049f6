"""The command: exit code 2 and one line for what a user got wrong."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from motet.export.bundle_writer import export_bundle
from motet.runtime.client.client import Client


@pytest.fixture(scope="module")
def bundle(tiny_model_dir, tmp_path_factory):
    return export_bundle(tiny_model_dir("llama"), tmp_path_factory.mktemp("cli") / "tiny")


def motet(*arguments, home=None):
    return subprocess.run(
        [sys.executable, "-m", "motet.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(*arguments):
    """The one line on stderr of a command that must end with 2."""
    result = motet(*arguments)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_generate(bundle):
    result = motet("generate", "hello", "--bundle", bundle, "--max-tokens", "4", "--seed", "1")
    assert result.returncode == 0, result.stderr
    assert "tokens" in result.stderr


<<<<<<< HEAD
def test_what_is_asked_for_is_printed(bundle):
    options = ("--max-tokens", "3", "--temperature", "0", "--ignore-eos", "--n", "2", "--logprobs", "1")
    result = motet("generate", "hello", "--bundle", bundle, *options, "--member-logprobs", "--request-id", "mine")
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    tokens = [line for line in lines if line.startswith("token ")]
    assert len(tokens) == 6
    assert all("logprob -" in line and "best " in line and "members -" in line for line in tokens)
    assert sum(line.startswith("[mine: length, 3 tokens") for line in lines) == 2


=======
@pytest.mark.slow
>>>>>>> ground
def test_users_mistakes(bundle, tmp_path, tiny_model_dir):
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
def test_malformed_data(tmp_path, tiny_model_dir):
    data = tmp_path / "data.jsonl"
    for content, expected in (
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b"{\n", "not JSON"),
        (b'{"text": 1}\n', "keys ['text']"),
    ):
        data.write_bytes(content)
        message = refused("tune", tiny_model_dir("llama"), "--data", data, "--out", tmp_path / "t")
        assert "line 1" in message
        assert expected in message


def test_port_in_use(bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in refused("serve", bundle, "--port", taken.getsockname()[1])


<<<<<<< HEAD
def test_drain_lets_the_answer_end_and_then_the_server_ends(bundle):
    command = [sys.executable, "-m", "motet.cli", "serve", str(bundle), "--port", "0"]
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


=======
@pytest.mark.slow
>>>>>>> ground
def test_wrong_family(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "model family 'mamba'" in refused("export", tmp_path, tmp_path / "b")
