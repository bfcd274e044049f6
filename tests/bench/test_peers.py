"""Runtimes that take turns: their figures and ratios, the workers that run them, and what is told to each."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from helpers.gguf_files import File, make_model
from motet.bench.peers import compare as peers
from motet.bench.peers import peer_worker, runtimes, worker
from motet.bench.peers.merged_gguf import write_merged_gguf
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.checkpoints.gguf import convert_gguf
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.engine.engine import Engine

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
def run_fake_peers(bundle_dir, tmp_path, monkeypatch, measured_limits):
    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    monkeypatch.setattr(worker, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(peers, "_paths", lambda _bundles, _model: {})
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


def test_a_gguf_file_with_other_weights(tmp_path):
    """It has the settings and the tokenizer of the file that was pulled, and the weights of the model that is compared."""
    own, other = make_model(tmp_path / "own", "llama"), make_model(tmp_path / "other", "llama", seed=1)
    File(own).write(tmp_path / "own.gguf")
    weights = {name: weight.numpy() for name, weight in read_weights(other).items()}
    merged = write_merged_gguf(tmp_path / "own.gguf", weights, read_config(own), tmp_path / "merged.gguf")
    for name in ("read", "before"):
        (tmp_path / name).mkdir()
    convert_gguf(merged, tmp_path / "read")
    found = read_weights(tmp_path / "read")
    assert set(found) == set(weights)
    assert all(np.array_equal(found[name].numpy(), weight) for name, weight in weights.items())
    convert_gguf(tmp_path / "own.gguf", tmp_path / "before")
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "read" / name).read_text()) == json.loads(
            (tmp_path / "before" / name).read_text()
        )
