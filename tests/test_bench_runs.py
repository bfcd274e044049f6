"""How the benches run things: loads that do or do not wait, runtimes that take turns, what a step must move."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import subprocess
import sys
import time
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from motet.bench import decode, peer_worker, peers, probes, report, serve
from motet.export.bundle_writer import export_bundle
from motet.finetune.tail import write_tail
from motet.runtime.bundle import Bundle
from motet.runtime.checkpoint import checkpoint_digest, read_weights
from motet.runtime.config import EngineConfig
from motet.runtime.engine import Engine
from motet.runtime.errors import ConfigError, OverloadedError, UnavailableError
from motet.runtime.output import Output
from motet.runtime.request import Ensemble, Member, Request, SamplingParams

LIMITS = {"threads": 1, "read_gb_s": 10.0, "int8_gmac_s": 100.0}


@pytest.fixture(scope="module")
def bundle_dir(tiny_model_dir, tmp_path_factory):
    """Members a, b.1, c and the base, two layers of their own each (of 4 with hidden 64, K and V 32, MLP 128)."""
    root, model = tmp_path_factory.mktemp("bench"), tiny_model_dir("llama")
    weights = read_weights(model)
    tails: dict[str, Path | None] = {}
    for index, name in enumerate(("a", "b.1", "c")):
        layers = [n for n in weights if n.startswith(("model.layers.2", "model.layers.3"))]
        own = {n: weights[n] + 0.01 * (1 + index) for n in layers}
        own["model.norm.weight"] = weights["model.norm.weight"] * (1.1 + index)
        tails[name] = root / name
        write_tail(root / name, {"name": name, "split_layer": 2, "base": {"digest": checkpoint_digest(model)}}, own)
    return export_bundle(model, root / "bundle", tails={**tails, "base": None}, bits=8)


# ---- serve -----------------------------------------------------------------------------------------------------------


class FakeClient:
    """Answers with two messages once `together` requests are open."""

    together = 1
    error: Exception | None = None

    def __init__(self, _address):
        cls = type(self)
        cls.open = cls.most_open = 0
        cls.prompts, cls.gate = [], asyncio.Event()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_exc): ...

    async def generate(self, prompt, **_fields):
        cls = type(self)
        cls.open += 1
        cls.most_open = max(cls.most_open, cls.open)
        cls.prompts.append(prompt)
        if cls.open >= cls.together:
            cls.gate.set()
        try:
            await asyncio.wait_for(cls.gate.wait(), 10)
            if cls.error is not None:
                raise cls.error
            yield Output("r", 0, 0, token_ids=[1])
            await asyncio.sleep(0)
            yield Output("r", 0, 0, token_ids=[2, 3])
            yield Output("r", 0, 0)  # a message without tokens is not an arrival
        finally:
            cls.open -= 1


@pytest.fixture
def fake_client(monkeypatch):
    cls = type("Fake", (FakeClient,), {})
    monkeypatch.setattr(serve, "AsyncClient", cls)
    return cls


def load(times, clients, duration_s):
    return asyncio.run(serve._load("nowhere", times, clients, duration_s, 8, 4, 320, 0))


def test_open_loop_does_not_wait_for_earlier_requests(fake_client):
    fake_client.together = 5  # nobody gets an answer before all five are here
    measured = load([0.0, 0.01, 0.02, 0.03, 0.04], 0, 1.0)
    assert fake_client.most_open == 5
    assert [m.num_tokens for m in measured] == [3] * 5
    assert [len(m.arrivals) for m in measured] == [2] * 5
    assert all(m.error is None and 0 < m.ttft <= m.arrivals[-1] <= m.end for m in measured)
    assert len({tuple(prompt) for prompt in fake_client.prompts}) == 5
    assert all(len(prompt) == 8 and max(prompt) < 320 for prompt in fake_client.prompts)


def test_closed_loop_has_one_request_a_client(fake_client):
    fake_client.together = 3
    measured = load(None, 3, 0.05)
    assert fake_client.most_open == 3
    assert len(measured) >= 3


def test_failed_requests_are_counted_and_disturb_nobody(fake_client):
    fake_client.error = OverloadedError("full")
    assert [m.error for m in load([0.0, 0.0], 0, 1.0)] == ["OverloadedError"] * 2


def test_tpot_counts_tokens_not_messages():
    assert serve.Measured(num_tokens=5, arrivals=[0.1, 0.5], end=0.5).tpot == pytest.approx(0.1)


def test_a_server_that_does_not_start_is_reported(tmp_path):
    with pytest.raises(UnavailableError, match="did not start"), serve.server_process(tmp_path / "nothing", 1):
        pass


# ---- decode ----------------------------------------------------------------------------------------------------------


def test_decode_rows_agree_with_themselves(bundle_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "measure", lambda _threads: LIMITS)
    result = decode.run(
        bundle_dir,
        tmp_path,
        batch_sizes=(1, 3),
        ensemble_sizes=(3, 2),
        prompt_tokens=12,
        context=16,
        new_tokens=6,
        repeats=2,
        threads=2,
    )
    rows = result["decode"]
    assert [(row["batch_size"], row["ensemble_size"]) for row in rows] == [(b, k) for b in (1, 3) for k in (1, 2, 3)]
    for row, one in zip(rows, [rows[0]] * 3 + [rows[3]] * 3, strict=True):
        seconds = row["step_ms"] / 1e3
        assert row["tok_s"] == pytest.approx(row["batch_size"] / seconds)
        assert row["ratio_to_one_member"] == pytest.approx(row["step_ms"] / one["step_ms"])
        assert row["share_of_bandwidth"] == pytest.approx(row["bytes"] / seconds / 10e9)
        assert row["share_of_int8"] == pytest.approx(row["macs"] / seconds / 100e9)


def test_step_work_counts_each_tail_once_and_every_sequences_cache(bundle_dir):
    bundle = Bundle.load(bundle_dir)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128  # q, k, v, o; gate, up, down
    head = 64 * 320
    assert decode.step_work(bundle, 5, 3, 16)[1] == 5 * ((2 + 3 * 2) * layer + head)
    moved = {k: decode.step_work(bundle, 5, k, 0)[0] for k in (1, 2, 3, 4)}
    tail = moved[2] - moved[1]
    assert tail == moved[3] - moved[2] == moved[4] - moved[3]  # the base's own tail is stored with the shared weights
    scales = 4 / 32  # float32, a scale a group of 32
    assert tail == int(2 * layer * (1 + scales)) + (2 * 2 + 1) * 64 * 4  # two layers, five norms
    assert moved[1] == int((4 * layer + head) * (1 + scales)) + (4 * 2 + 1) * 64 * 4
    assert decode.step_work(bundle, 5, 3, 16)[0] - moved[3] == 5 * 16 * (2 + 3 * 2) * 2 * 32 * 4


def test_decode_refuses_more_members_than_there_are(bundle_dir, tmp_path):
    with pytest.raises(ConfigError, match="1…4"):
        decode.run(bundle_dir, tmp_path, ensemble_sizes=(5,))


# ---- peers -----------------------------------------------------------------------------------------------------------

FAKE_WORKER = """
import json, sys
job = json.loads(sys.stdin.readline())
if job["runtime"] == "OpenVINO GenAI":
    print(json.dumps({"error": "not installed (openvino)"}), flush=True)
    sys.exit()
factor = {"motet": 1, "llama.cpp": 2, "CTranslate2": 4, "transformers": 8}[job["runtime"]]
print(json.dumps({"version": f"{job['threads']} threads"}), flush=True)
for line in sys.stdin:
    call = json.loads(line)
    prompts, n = call["prompts"], call["new_tokens"]
    if job["runtime"] == "transformers":
        print(json.dumps({"seconds": 1.0, "tokens": [1] * (n - 1)}), flush=True)
        continue
    # a prompt token takes 1 ms, a decode step 10 ms and 1 ms a sequence, all times the factor
    seconds = factor * (len(prompts) * len(prompts[0]) * 1e-3 + (n - 1) * (1e-2 + len(prompts) * 1e-3))
    print(json.dumps({"seconds": seconds, "tokens": [1] * n}), flush=True)
"""


@pytest.fixture
def run_fake_peers(bundle_dir, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    monkeypatch.setattr(peers, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(peers, "_paths", lambda _bundle, _model: {})
    monkeypatch.setattr(probes, "measure", lambda _threads: LIMITS)
    lengths = {"prompt_tokens": 32, "context": 16, "new_tokens": 5, "concurrency": 4, "repeats": 2, "threads": 3}
    names = ["llama.cpp", "CTranslate2", "OpenVINO GenAI", "transformers"]
    return lambda: peers.run(bundle_dir, "none", tmp_path, names=names, **lengths)


def test_peers_figures_and_ratios(run_fake_peers, capsys):
    rows = {row["name"]: row for row in run_fake_peers()["peers"]}
    assert list(rows) == ["motet", "llama.cpp", "CTranslate2", "OpenVINO GenAI", "transformers"]
    for name, factor in (("motet", 1), ("llama.cpp", 2), ("CTranslate2", 4)):
        row = rows[name]
        assert row["error"] is None
        assert row["version"] == "3 threads"
        assert row["prefill_tok_s"] == pytest.approx(1000 / factor)
        assert row["one_tok_s"] == pytest.approx(1 / 0.011 / factor)
        assert row["many_tok_s"] == pytest.approx(4 / 0.014 / factor)
        assert row["motet_ratio"] == pytest.approx(dict.fromkeys(peers.FIGURES, factor))
    assert rows["OpenVINO GenAI"]["error"] == "not installed (openvino)"
    assert "another number of tokens" in rows["transformers"]["error"]  # a wrong answer has no figures
    assert "one_tok_s" not in rows["transformers"]
    shown, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    assert json.loads(last)["bench"] == "peers"
    assert "…" not in shown  # no figure is cut off


def test_only_the_measured_runtime_runs(run_fake_peers, monkeypatch):
    everyone: list[peers.Worker] = []
    calls: list[str] = []
    original = peers.Worker._ask

    def ask(worker, message):
        if "prompts" in message:
            calls.append(worker.name)
            for other in everyone:
                if other is not worker and other.error is None:
                    wait_until_stopped(other._process.pid)
        else:
            everyone.append(worker)
        return original(worker, message)

    monkeypatch.setattr(peers.Worker, "_ask", ask)
    run_fake_peers()
    assert calls[:3] == ["motet", "llama.cpp", "CTranslate2"]  # they take turns within a case
    assert calls.count("motet") == calls.count("CTranslate2") == (2 + 1) * (1 + 2 + 2)
    assert all(worker._process.poll() is not None for worker in everyone)


def wait_until_stopped(pid):
    """A stop signal takes effect a moment after it is sent."""
    for _ in range(500):
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "T":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} is in state {state}, not stopped")


def worker_answers(job, *calls, flags=()):
    lines = "".join(json.dumps(message) + "\n" for message in (job, *calls))
    command = [sys.executable, *flags, peer_worker.__file__]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_missing_peer_is_listed_as_not_installed():
    job = {"runtime": "CTranslate2", "threads": 1, "max_tokens": 64, "max_sequences": 1, "paths": {}}
    assert worker_answers(job, flags=("-S",)) == [{"error": "not installed (ctranslate2)"}]  # -S: no site-packages


def test_the_motet_worker_generates_what_the_engine_does(bundle_dir):
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    job = {"runtime": "motet", "threads": 2, "max_tokens": 64, "max_sequences": 2, "paths": {"bundle": str(bundle_dir)}}
    ready, answer = worker_answers(job, {"prompts": prompts, "new_tokens": 6})
    with Engine.from_bundle(bundle_dir, EngineConfig(threads=2, max_num_seqs=2, max_model_len=64)) as engine:
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        request = Request("r", (tuple(prompts[0]),), Ensemble((Member("a", 1.0),)), params)
        expected = engine.complete([request])[0][0].token_ids
    assert ready == {"version": importlib.metadata.version("motet")}
    assert answer["tokens"] == expected
    assert answer["seconds"] > 0


def test_onnxruntime_genai_is_told_the_thread_count(monkeypatch):
    """Left alone it takes half of the CPUs, which would make the comparison unfair."""
    overlays = []

    class Config:
        def __init__(self, path):
            assert path == "somewhere"

        def overlay(self, text):
            overlays.append(json.loads(text))

    fake = types.SimpleNamespace(Config=Config, Model=lambda config: config)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", fake)
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "1")
    peer_worker.load_onnxruntime_genai({"threads": 3, "paths": {"genai": "somewhere"}})
    assert overlays == [{"model": {"decoder": {"session_options": {"intra_op_num_threads": 3}}}}]


# ---- probes and report -----------------------------------------------------------------------------------------------


def test_probes_measure_in_a_process_that_has_an_engine(bundle_dir):
    with Engine.from_bundle(bundle_dir, EngineConfig(threads=2, max_num_seqs=1, max_model_len=64)):
        found = probes.measure(1)
    assert found["threads"] == 1
    assert 0.1 < found["read_gb_s"] < 1e4
    assert 0.1 < found["int8_gmac_s"] < 1e6


def test_a_plot_is_well_formed_and_to_scale():
    plot = report.Plot("A < B & C", "tok/s", ["x<y", "z"], {"one": [1.0, 4.0], "two": [2.0, 0.0]})
    root = ElementTree.fromstring(report._svg(plot))
    assert [float(element.attrib["width"]) for element in root.iter("rect")] == [105.0, 210.0, 420.0, 0.0]
    assert "A < B & C (tok/s)" in {element.text for element in root.iter("text")}
