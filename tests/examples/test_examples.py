"""The examples do what they say: the tiny engine gives the real engine's tokens, the clients stream from a real server."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import make_tail
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member, Request, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.client.client import Client
from motet.runtime.engine.engine import Engine
from motet.runtime.serve.local import local_server

pytestmark = pytest.mark.slow  # a bundle is exported first
EXAMPLES = Path(__file__).parents[2] / "examples"
MIX = {"base": 0.25, "warm": 0.75}


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def members(tiny_model_dir, tmp_path_factory):
    """(model directory, member → tail, their bundle in 32 bits)."""
    root, model_dir = tmp_path_factory.mktemp("examples"), tiny_model_dir("llama")
    tails = {"base": None, "warm": make_tail(model_dir, root / "warm", "warm", 1, 0.5)}
    return model_dir, tails, export_bundle(model_dir, root / "bundle", tails=tails, bits=32)


@pytest.mark.parametrize("space", list(Space))
@pytest.mark.parametrize("mix", [MIX, {"base": 1.0}], ids=["ensemble", "one"])
def test_tiny_engine_gives_the_real_engines_tokens(members, mix, space):
    model_dir, tails, bundle = members
    module = load("tiny_engine")
    settings = [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "top_p": 0.9, "seed": 6},
        {"temperature": 1.0, "top_p": 0.5, "seed": 8, "max_tokens": 20},
        {"temperature": 1.5, "seed": 7},
        {"max_tokens": 5},
    ]
    prompts = [[i + 65, 70, *range(80, 80 + 3 * i)] for i in range(len(settings))]
    sequences = [module.Sequence(p, **{"max_tokens": 12, **s}) for p, s in zip(prompts, settings, strict=True)]
    module.TinyEngine(model_dir, tails, mix, space=space, max_num_seqs=3).run(sequences)

    ensemble = Ensemble(tuple(Member(name, value) for name, value in mix.items()), space)
    params = [SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **s}) for s in settings]
    requests = [Request(str(i), (tuple(p),), ensemble, s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
    with Engine.from_bundle(
        bundle, EngineConfig(backend="onnx", max_num_seqs=8, max_model_len=64, threads=2)
    ) as engine:
        served = [choices[0].token_ids for choices in engine.complete(requests)]
    assert [sequence.output_ids for sequence in sequences] == served


@pytest.fixture(scope="module")
def address(members):
    with local_server(members[2], EngineConfig(max_num_seqs=4, max_model_len=256, threads=1)) as address:
        yield address


def complete(address):
    with Client(address) as client:
        messages = [{"role": "user", "content": "Hello"}]
        return client.complete(messages, mix=MIX, max_tokens=20, temperature=0.7, top_p=0.95, seed=7)[0]


def run(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, **options)


def test_python_client(address):
    script = EXAMPLES / "client.py"
    done = run(sys.executable, script, "Hello", "--mix", "base=0.25,warm=0.75", "--address", address)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\[(stop|length), \d+ tokens, seed \d+\]\n", done.stderr)
    refused = run(sys.executable, script, "Hello", "--mix", "base=0.25,warm=0.25", "--address", address)
    assert refused.returncode == 2
    assert "the mix sums to 0.5; it must sum to 1" in refused.stderr
    unknown = run(sys.executable, script, "Hello", "--mix", "absent=1", "--address", address)
    assert unknown.returncode == 2
    assert "'absent' is not a member" in unknown.stderr
    away = run(sys.executable, script, "Hello", "--address", "127.0.0.1:1")
    assert away.returncode == 1
    assert "is `motet serve` running there?" in away.stderr


@pytest.fixture(scope="module")
def node_client(tmp_path_factory):
    """The Node.js client beside its pinned packages and the proto, as in a checkout."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed (node and npm)")
    root = tmp_path_factory.mktemp("node")
    shutil.copytree(EXAMPLES.parent / "proto" / "motet", root / "proto" / "motet")
    shutil.copytree(EXAMPLES / "node", root / "examples" / "node", ignore=shutil.ignore_patterns("node_modules"))
    installed = run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=root / "examples" / "node")
    if installed.returncode != 0 and "network" in installed.stderr.lower():
        pytest.skip("the npm registry is out of reach")
    assert installed.returncode == 0, installed.stderr
    return root / "examples" / "node" / "client.mjs"


@pytest.mark.network
def test_node_client(address, node_client):
    options = ("--max-tokens", 20, "--seed", 7, "--address", address)
    done = run("node", node_client, "Hello", "--mix", "base=0.25,warm=0.75", *options)
    expected = complete(address)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.text + "\n"
    assert done.stderr == f"[{expected.finish_reason}, {len(expected.token_ids)} tokens, seed 7]\n"
    refused = run("node", node_client, "Hello", "--mix", "base=0.25,warm=0.25", *options)
    assert refused.returncode == 2
    assert "INVALID_ARGUMENT: the mix sums to 0.5; it must sum to 1" in refused.stderr
    away = run("node", node_client, "Hello", "--address", "127.0.0.1:1")
    assert away.returncode == 1
    assert "UNAVAILABLE" in away.stderr
