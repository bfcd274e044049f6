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
from functools import partial
from pathlib import Path

import pytest
from motet.bench import decode, serve
from motet.bench.lib import probes, report
from motet.bench.peers import compare as peers
from motet.bench.peers import peer_worker, runtimes, worker
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.output import Output
from motet.runtime.api.request import Ensemble, Member, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.checkpoints.huggingface import checkpoint_digest, read_weights
from motet.runtime.checkpoints.members.tail import write_tail
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError, OverloadedError, UnavailableError
from motet.runtime.model.bundle import Bundle

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


@pytest.mark.slow
def test_a_server_that_does_not_start_is_reported(tmp_path):
    with pytest.raises(UnavailableError, match="did not start"), serve.server_process(tmp_path / "nothing", 1):
        pass


# ---- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.parametrize(("native", "scale_bytes"), [(False, 4), (True, 2)])
def test_step_work_counts_each_tail_once_and_every_sequences_cache(bundle_dir, native, scale_bytes):
    bundle, step_work = Bundle.load(bundle_dir), partial(decode.step_work, native=native)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128  # q, k, v, o; gate, up, down
    head = 64 * 320
    assert step_work(bundle, 5, 3, 16, 256)[1] == 5 * ((2 + 3 * 2) * layer + head)
    moved = {k: step_work(bundle, 5, k, 0, 256)[0] for k in (1, 2, 3, 4)}
    tail = moved[2] - moved[1]
    assert tail == moved[3] - moved[2] == moved[4] - moved[3]  # the base's own tail is stored with the shared weights
    layer, head = layer + layer // 64 * scale_bytes, head + head // 32 * scale_bytes
    assert tail == 2 * layer + (2 * 2 + 1) * 64 * 4  # two layers, five norms
    assert moved[1] == 4 * layer + head + (4 * 2 + 1) * 64 * 4
    assert step_work(bundle, 5, 3, 16, 256)[0] - moved[3] == 5 * 16 * (2 + 3 * 2) * 256


def test_decode_refuses_more_members_than_there_are(bundle_dir, tmp_path):
    with pytest.raises(ConfigError, match="1…4"):
        decode.run(bundle_dir, tmp_path, ensemble_sizes=(5,))


# ---- peers -----------------------------------------------------------------------------------------------------------

FAKE_WORKER = """
import json, sys
def answer(**values):
    print(json.dumps(values), flush=True)
job = json.loads(sys.stdin.readline())
name = job["runtime"]
if name == "OpenVINO GenAI":
    answer(error="not installed (openvino)")
    sys.exit()
factor = {"motet": 1, "llama.cpp": 2, "CTranslate2": 4, "transformers": 8}[name]
answer(version=f"{job['threads']} threads")
for line in sys.stdin:
    call = json.loads(line)
    prompts, steps, chunks = call["prompts"], call["steps"], call["chunks"]
    if name == "CTranslate2" and len(prompts[0]) > 40:
        answer(error="too long")
        continue
    # a prompt token takes 1 ms, a decode step 10 ms and 1 ms a sequence, all times the factor
    answer(seconds=factor * len(prompts) * len(prompts[0]) * 1e-3)
    for _ in range(chunks):
        sys.stdin.readline()
        seconds = factor * steps * (1e-2 + len(prompts) * 1e-3)
        answer(seconds=seconds, tokens=steps * len(prompts), cpu_seconds=2 * seconds)
    answer(sequence=[1] * (1 + chunks * (1 + steps) - (name == "transformers")))
"""


@pytest.fixture
def run_fake_peers(bundle_dir, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    monkeypatch.setattr(worker, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(peers, "_paths", lambda _bundles, _model: {})
    monkeypatch.setattr(probes, "measure", lambda _threads: LIMITS)
    lengths = {"prompt_tokens": 32, "context": 16, "long_context": 64, "steps": 5, "concurrency": 4, "repeats": 2}
    names = ["llama.cpp Q4_1", "CTranslate2", "OpenVINO GenAI int4", "transformers"]
    return lambda: peers.run([bundle_dir], "none", tmp_path, names=names, threads=3, **lengths)


def test_peers_figures_and_ratios(run_fake_peers, capsys):
    rows = {row["name"]: row for row in run_fake_peers()["runtimes"]}
    assert list(rows) == [
        "motet int8",
        "llama.cpp Q4_1",
        "CTranslate2 int8",
        "OpenVINO GenAI int4",
        "transformers bf16",
    ]
    for name, factor in (("motet int8", 1), ("llama.cpp Q4_1", 2), ("CTranslate2 int8", 4)):
        row = rows[name]
        assert row["error"] is None
        assert row["version"] == "3 threads"
        expected = {"prefill": 1000 / factor, "one": 1 / 0.011 / factor, "many": 4 / 0.014 / factor}
        if name != "CTranslate2 int8":
            expected["long"] = 1 / 0.011 / factor
        assert row["tok_s"] == pytest.approx(expected)
        assert row["cpus"] == {case: None if case == "prefill" else pytest.approx(2) for case in expected}
    assert rows["motet int8"]["ratio"] == pytest.approx(dict.fromkeys(("prefill", "one", "many", "long"), 2))
    assert set(rows["motet int8"]["fastest_peer"].values()) == {"llama.cpp Q4_1"}
    assert rows["CTranslate2 int8"]["errors"] == {"long": "too long"}  # what one cannot do is only its own loss
    assert rows["OpenVINO GenAI int4"]["error"] == "not installed (openvino)"
    assert rows["transformers bf16"]["tok_s"] == {}  # a wrong answer has no figures
    assert "were asked for" in rows["transformers bf16"]["errors"]["prefill"]
    shown, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    assert json.loads(last)["bench"] == "peers"
    assert "…" not in shown  # no figure is cut off


def test_only_the_measured_runtime_runs(run_fake_peers, monkeypatch):
    everyone: list[worker.Worker] = []
    calls: list[str] = []
    original = worker.Worker._ask

    def ask(self, message):
        if self in everyone:
            calls.append(self.name)
            for other in everyone:
                if other is not self and other.error is None:
                    wait_until_stopped(other._process.pid)
        else:
            everyone.append(self)
        return original(self, message)

    monkeypatch.setattr(worker.Worker, "_ask", ask)
    run_fake_peers()
    # six calls a column of chunks (a prompt, a round that warms up, two that count, an end), two a prompt alone
    assert calls.count("motet int8") == calls.count("llama.cpp Q4_1") == 3 * 2 + 3 * (1 + 3 + 1)
    assert calls[:4] == ["motet int8", "motet int8", "llama.cpp Q4_1", "llama.cpp Q4_1"]  # they take turns
    assert all(one._process.poll() is not None for one in everyone)


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
    job = {"runtime": "CTranslate2", "variant": "int8", "threads": 1, "lengths": {"1": 64}, "paths": {}}
    assert worker_answers(job, flags=("-S",)) == [{"error": "not installed (ctranslate2)"}]  # -S: no site-packages


@pytest.mark.slow
def test_the_motet_worker_generates_what_the_engine_does(bundle_dir):
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    paths = {"bundle": str(bundle_dir)}
    job = {"runtime": "motet", "variant": "int8", "threads": 2, "lengths": {"2": 64}, "paths": paths}
    go = {"go": True}
    ready, prompt, *chunks, ended = worker_answers(job, {"prompts": prompts, "steps": 2, "chunks": 2}, go, go)
    with Engine.from_bundle(bundle_dir, EngineConfig(threads=2, max_num_seqs=2, max_model_len=64)) as engine:
        params = SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True)
        request = Request("r", (tuple(prompts[0]),), Ensemble((Member("a", 1.0),)), params)
        expected = engine.complete([request])[0][0].token_ids
    assert ready == {"version": importlib.metadata.version("motet")}
    assert ended == {"sequence": expected}
    assert prompt["seconds"] > 0
    assert [chunk["tokens"] for chunk in chunks] == [4, 4]


def test_a_pacer_counts_the_steps_in_which_all_run():
    answers, waits = [], []
    pacer = peer_worker.Pacer(2, 3, 2, answers.append, lambda: waits.append(len(answers)))
    for _ in range(2):
        pacer.note(0)  # ahead of the other
    while pacer._counts[1] < pacer.last_token:
        pacer.note(1)
        pacer.note(0)
    assert [answer.get("tokens") for answer in answers] == [None, 6, 6]
    assert waits == [1, 2]  # not after the last
    assert pacer.last_token == 9
    assert pacer.new_tokens > pacer.last_token


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
    job = {"threads": 3, "variant": "int4", "paths": {"genai-int4": "somewhere"}}
    runtimes.load_onnxruntime_genai(job)
    assert overlays == [{"model": {"decoder": {"session_options": {"intra_op_num_threads": 3}}}}]


# ---- probes and report -----------------------------------------------------------------------------------------------


@pytest.mark.slow
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
