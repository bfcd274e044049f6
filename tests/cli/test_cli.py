"""The command: exit code 2 and one line for what a user got wrong."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from motet.export.bundle_writer import export_bundle


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


@pytest.mark.slow
def test_users_mistakes(bundle, tmp_path, tiny_model_dir):
    generate = ("generate", "hi", "--bundle", bundle)
    assert "sums to 0.5" in refused(*generate, "--mix", "base=0.5")
    assert "its members are" in refused(*generate, "--mix", "zz=1")
    assert "need space LOGITS" in refused(*generate, "--mix", "base=1.5,zz=-0.5", "--space", "probs")
    assert "name=coefficient" in refused(*generate, "--mix", "base:1")
    assert "temperature" in refused(*generate, "--temperature", "nan")
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


@pytest.mark.slow
def test_wrong_family(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "model family 'mamba'" in refused("export", tmp_path, tmp_path / "b")
