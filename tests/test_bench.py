"""The benches' arithmetic and structure, on tiny models and fake runtimes. Nothing here asserts a time."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import subprocess
import sys
import time
import types
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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
def bundle_dir(tiny_model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Members a, b, c and the base, two layers of their own each (of 4 with hidden 64, K and V 32, MLP 128)."""
    root, model = tmp_path_factory.mktemp("bench"), tiny_model_dir("llama")
    weights = read_weights(model)
    tails: dict[str, Path | None] = {}
    for index, name in enumerate(("a", "b.1", "c")):
        own = {
            n: w + 0.01 * (1 + index) for n, w in weights.items() if n.startswith(("model.layers.2", "model.layers.3"))
        }
        own["model.norm.weight"] = weights["model.norm.weight"] * (1.1 + index)
        tails[name] = root / name
        manifest = {"name": name, "split_layer": 2, "base": {"digest": checkpoint_digest(model)}}
        write_tail(root / name, manifest, own)
    return export_bundle(model, root / "bundle", tails={**tails, "base": None}, bits=8)


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "measure", lambda threads: LIMITS)


# ---- serve: arithmetic -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentile_is_numpys_linear_one(values: list[float], share: float) -> None:
    assert serve.percentile(values, share) == pytest.approx(float(np.percentile(values, 100 * share)), abs=1e-6)


def test_percentile_of_nothing_is_zero() -> None:
    assert serve.percentile([], 0.5) == 0.0


def test_arrivals_are_a_poisson_process() -> None:
    times = serve.poisson_arrivals(rate=50.0, duration_s=400.0, seed=3)
    gaps = np.diff([0.0, *times])
    assert times == sorted(times) and times[0] >= 0 and times[-1] < 400.0
    assert len(times) == pytest.approx(20_000, abs=6 * 20_000**0.5)  # the count's standard deviation is its root
    assert gaps.mean() == pytest.approx(0.02, rel=0.05) and gaps.std() == pytest.approx(0.02, rel=0.05)
    assert times == serve.poisson_arrivals(50.0, 400.0, 3) != serve.poisson_arrivals(50.0, 400.0, 4)


def test_summary_counts_goodput_and_failures() -> None:
    requests = [
        serve.Measured(num_tokens=3, arrivals=[0.1, 0.2, 0.3], end=0.3),  # within both limits: TPOT is 100 ms
        serve.Measured(num_tokens=5, arrivals=[0.1, 0.5], end=0.5),  # a message with four tokens: TPOT is 100 ms too
        serve.Measured(num_tokens=2, arrivals=[0.6, 0.7], end=0.7),  # too late
        serve.Measured(num_tokens=2, arrivals=[0.1, 0.4], end=0.4),  # too slow
        serve.Measured(end=0.1, error="OverloadedError"),
        serve.Measured(num_tokens=1, arrivals=[0.1], end=0.2, error="UnavailableError"),  # broke off: no token counts
        serve.Measured(end=0.1, error="OverloadedError"),
    ]
    result = serve.summary(requests, seconds=2.0, ttft_ms=500.0, tpot_ms=100.001)
    assert result["requests"] == 7 and result["failures"] == {"OverloadedError": 2, "UnavailableError": 1}
    assert (result["requests_s"], result["tokens_s"], result["goodput_s"]) == (2.0, 6.0, 1.0)
    assert result["ttft_ms"]["p50"] == pytest.approx(100) and result["ttft_ms"]["p99"] == pytest.approx(585)
    assert result["itl_ms"]["p50"] == pytest.approx(100)  # of 100, 100, 400, 100, 300
    assert result["itl_ms"]["p90"] == pytest.approx(360)
    assert result["e2e_ms"]["p50"] == pytest.approx(450)


# ---- serve: the loads ------------------------------------------------------------------------------------------------


class FakeClient:
    """Answers a request with two messages once `together` requests are open."""

    together = 1
    error: Exception | None = None
    open = most_open = 0
    prompts: list[list[int]]
    gate: asyncio.Event

    def __init__(self, _address: str) -> None:
        cls = type(self)
        cls.open = cls.most_open = 0
        cls.prompts, cls.gate = [], asyncio.Event()

    async def __aenter__(self) -> FakeClient:
        return self

    async def __aexit__(self, *_exc: object) -> None: ...

    async def generate(self, prompt: list[int], **_fields: Any) -> AsyncIterator[Output]:
        cls = type(self)
        cls.open += 1
        cls.most_open = max(cls.most_open, cls.open)
        cls.prompts.append(prompt)
        if cls.open >= cls.together:
            cls.gate.set()
        try:
            await asyncio.wait_for(cls.gate.wait(), 20)
            if cls.error is not None:
                raise cls.error
            yield Output("r", 0, 0, token_ids=[1])
            await asyncio.sleep(0)
            yield Output("r", 0, 0, token_ids=[2, 3])
            yield Output("r", 0, 0)  # a message without tokens is not an arrival
        finally:
            cls.open -= 1


def load(times: list[float] | None, clients: int, duration_s: float) -> list[serve.Measured]:
    return asyncio.run(serve._load("nowhere", times, clients, duration_s, 8, 4, 320, 0))


@pytest.fixture
def fake_client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    cls = type("Fake", (FakeClient,), {})
    monkeypatch.setattr(serve, "AsyncClient", cls)
    return cls


def test_open_loop_does_not_wait_for_earlier_requests(fake_client: type[FakeClient]) -> None:
    fake_client.together = 5  # nobody gets an answer before all five are here: a closed loop would end in errors
    measured = load([0.0, 0.01, 0.02, 0.03, 0.04], 0, 1.0)
    assert fake_client.most_open == 5
    assert [m.num_tokens for m in measured] == [3] * 5 and [len(m.arrivals) for m in measured] == [2] * 5
    assert all(m.error is None and 0 < m.ttft <= m.arrivals[-1] <= m.end for m in measured)
    assert len({tuple(prompt) for prompt in fake_client.prompts}) == 5
    assert all(len(prompt) == 8 and max(prompt) < 320 for prompt in fake_client.prompts)


def test_closed_loop_has_one_request_a_client(fake_client: type[FakeClient]) -> None:
    fake_client.together = 3
    measured = load(None, 3, 0.05)
    assert fake_client.most_open == 3 and len(measured) >= 3


def test_failed_requests_are_counted_and_disturb_nobody(fake_client: type[FakeClient]) -> None:
    fake_client.error = OverloadedError("full")
    assert [m.error for m in load([0.0, 0.0], 0, 1.0)] == ["OverloadedError"] * 2


def test_a_server_that_does_not_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="did not start"), serve.server_process(tmp_path / "nothing", 1):
        pass


def test_serve_measures_a_real_server(bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = serve.run(
        bundle_dir, tmp_path, rates=[20.0], clients=[2], duration_s=0.5, prompt_tokens=8, new_tokens=4, threads=1
    )
    kinds = [(entry["load"], entry["rate_or_clients"]) for entry in result["loads"]]
    assert kinds == [("open", 20.0), ("closed", 2)]
    assert result["loads"][0]["requests"] == len(serve.poisson_arrivals(20.0, 0.5, 0))
    for entry in result["loads"]:
        assert entry["failures"] == {} and entry["requests"] > 0
        assert entry["tokens_s"] == pytest.approx(4 * entry["requests_s"])
        assert 0 < entry["ttft_ms"]["p50"] <= entry["ttft_ms"]["p99"] <= entry["e2e_ms"]["p99"]
    check_report("serve", result, tmp_path, capsys)


# ---- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("known_limits")
def test_decode_rows_agree_with_themselves(
    bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = decode.run(
        bundle_dir,
        tmp_path,
        batch_sizes=(1, 3),
        ensemble_sizes=(3, 2),
        prompt_tokens=12,
        context=16,
        new_tokens=6,
        repeats=2,
        threads=1,
    )
    rows = result["decode"]
    assert [(row["batch_size"], row["ensemble_size"]) for row in rows] == [(b, k) for b in (1, 3) for k in (1, 2, 3)]
    assert result["prefill_tok_s"] > 0 and result["limits"] == LIMITS
    for row, one in zip(rows, [rows[0]] * 3 + [rows[3]] * 3, strict=True):
        seconds = row["step_ms"] / 1e3
        assert row["tok_s"] == pytest.approx(row["batch_size"] / seconds)
        assert row["ratio_to_one_member"] == pytest.approx(row["step_ms"] / one["step_ms"])
        assert row["share_of_bandwidth"] == pytest.approx(row["bytes"] / seconds / 10e9)
        assert row["share_of_int8"] == pytest.approx(row["macs"] / seconds / 100e9)
    check_report("decode", result, tmp_path, capsys)


def test_step_work_counts_each_tail_once_and_every_sequences_cache(bundle_dir: Path) -> None:
    bundle = Bundle.load(bundle_dir)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128  # q, k, v, o; gate, up, down
    head = 64 * 320
    cache = 2 * 32 * 4  # K and V of one position of one layer, float32
    assert decode.step_work(bundle, 1, 1, 16)[1] == 4 * layer + head
    assert decode.step_work(bundle, 5, 3, 16)[1] == 5 * ((2 + 3 * 2) * layer + head)

    moved = {k: decode.step_work(bundle, 5, k, 0)[0] for k in (1, 2, 3, 4)}
    tail = moved[2] - moved[1]
    assert tail == moved[3] - moved[2] == moved[4] - moved[3]  # the base's own tail is stored with the shared weights
    assert tail == decode.step_work(bundle, 1, 2, 0)[0] - decode.step_work(bundle, 1, 1, 0)[0]
    scales = 4 / 32  # float32, a scale a group of 32
    assert tail == int(2 * layer * (1 + scales)) + (2 * 2 + 1) * 64 * 4  # two layers, five norms
    assert moved[1] == int((4 * layer + head) * (1 + scales)) + (4 * 2 + 1) * 64 * 4
    assert decode.step_work(bundle, 5, 3, 16)[0] - moved[3] == 5 * 16 * (2 + 3 * 2) * cache


def test_decode_refuses_more_members_than_there_are(bundle_dir: Path, tmp_path: Path) -> None:
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
def fake_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_limits: None) -> None:
    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    monkeypatch.setattr(peers, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(peers, "_paths", lambda _bundle, _model: {})


def run_peers(bundle_dir: Path, out: Path) -> dict[str, Any]:
    return peers.run(
        bundle_dir,
        "none",
        out,
        names=["llama.cpp", "CTranslate2", "OpenVINO GenAI", "transformers"],
        prompt_tokens=32,
        context=16,
        new_tokens=5,
        concurrency=4,
        repeats=2,
        threads=3,
    )


@pytest.mark.usefixtures("fake_peers")
def test_peers_figures_and_ratios(bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_peers(bundle_dir, tmp_path)
    rows = {row["name"]: row for row in result["peers"]}
    assert list(rows) == ["motet", "llama.cpp", "CTranslate2", "OpenVINO GenAI", "transformers"]
    for name, factor in (("motet", 1), ("llama.cpp", 2), ("CTranslate2", 4)):
        row = rows[name]
        assert row["error"] is None and row["version"] == "3 threads"
        assert row["prefill_tok_s"] == pytest.approx(1000 / factor)
        assert row["one_tok_s"] == pytest.approx(1 / 0.011 / factor)
        assert row["many_tok_s"] == pytest.approx(4 / 0.014 / factor)
        assert row["motet_ratio"] == pytest.approx(dict.fromkeys(peers.FIGURES, factor))
    assert rows["OpenVINO GenAI"]["error"] == "not installed (openvino)"
    assert "another number of tokens" in rows["transformers"]["error"]  # a wrong answer has no figures
    assert "one_tok_s" not in rows["transformers"]
    check_report("peers", result, tmp_path, capsys)


@pytest.mark.usefixtures("fake_peers")
def test_only_the_measured_runtime_runs(bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everyone: list[peers.Worker] = []
    calls: list[str] = []
    original = peers.Worker._ask

    def ask(worker: peers.Worker, message: dict[str, Any]) -> dict[str, Any]:
        if "prompts" in message:
            calls.append(worker.name)
            for other in everyone:
                if other is not worker and other.error is None:
                    wait_until_stopped(other._process.pid)
        else:
            everyone.append(worker)
        return original(worker, message)

    monkeypatch.setattr(peers.Worker, "_ask", ask)
    run_peers(bundle_dir, tmp_path)
    assert calls[:3] == ["motet", "llama.cpp", "CTranslate2"]  # they take turns within a case
    assert calls.count("motet") == calls.count("CTranslate2") == (2 + 1) * (1 + 2 + 2)
    assert all(worker._process.poll() is not None for worker in everyone)


def wait_until_stopped(pid: int) -> None:
    """A stop signal takes effect a moment after it is sent."""
    for _ in range(500):
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "T":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} is in state {state}, not stopped")


def test_unknown_peers_are_refused(bundle_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="abacus"):
        peers.run(bundle_dir, "none", tmp_path, names=["abacus"])


def worker_answers(job: dict[str, Any], *calls: dict[str, Any], flags: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    lines = "".join(json.dumps(message) + "\n" for message in (job, *calls))
    command = [sys.executable, *flags, peer_worker.__file__]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_missing_peer_is_listed_as_not_installed() -> None:
    job = {"runtime": "CTranslate2", "threads": 1, "max_tokens": 64, "max_sequences": 1, "paths": {}}
    assert worker_answers(job, flags=("-S",)) == [{"error": "not installed (ctranslate2)"}]  # -S: no site-packages


def test_the_motet_worker_generates_what_the_engine_does(bundle_dir: Path) -> None:
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    job = {"runtime": "motet", "threads": 1, "max_tokens": 64, "max_sequences": 2, "paths": {"bundle": str(bundle_dir)}}
    ready, answer = worker_answers(job, {"prompts": prompts, "new_tokens": 6})
    with Engine.from_bundle(bundle_dir, EngineConfig(threads=1, max_num_seqs=2, max_model_len=64)) as engine:
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        request = Request("r", (tuple(prompts[0]),), Ensemble((Member("a", 1.0),)), params)
        expected = engine.complete([request])[0][0].token_ids
    assert ready == {"version": importlib.metadata.version("motet")}
    assert answer["tokens"] == expected and answer["seconds"] > 0


def test_onnxruntime_genai_is_told_the_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone it takes half of the CPUs, which would make the comparison unfair."""
    overlays: list[dict[str, Any]] = []

    class Config:
        def __init__(self, path: str) -> None:
            assert path == "somewhere"

        def overlay(self, text: str) -> None:
            overlays.append(json.loads(text))

    fake = types.SimpleNamespace(Config=Config, Model=lambda config: config)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "1")
    peer_worker.load_onnxruntime_genai({"threads": 3, "paths": {"genai": "somewhere"}})
    assert overlays == [{"model": {"decoder": {"session_options": {"intra_op_num_threads": 3}}}}]


# ---- probes and report -----------------------------------------------------------------------------------------------


def test_probes_measure_something() -> None:
    found = probes.measure(1)
    assert found["threads"] == 1 and 0.1 < found["read_gb_s"] < 1e4 and 0.1 < found["int8_gmac_s"] < 1e6


def test_machine_names_the_versions() -> None:
    found = report.machine()
    assert found["versions"]["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert {"machine", "python", "versions"} <= set(found)


def test_a_plot_is_well_formed_and_to_scale() -> None:
    plot = report.Plot("A < B & C", "tok/s", ["x<y", "z"], {"one": [1.0, 4.0], "two": [2.0, 0.0]})
    root = ElementTree.fromstring(report._svg(plot))
    widths = [float(element.attrib["width"]) for element in root.iter("rect")]
    assert widths == [105.0, 210.0, 420.0, 0.0]  # label by label, series by series, of 420
    assert "A < B & C (tok/s)" in {element.text for element in root.iter("text")}


def check_report(name: str, result: dict[str, Any], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON file = last line of stdout = what `run` returned; the page refers to nothing outside it."""
    expected = json.loads(json.dumps(result))
    assert json.loads((out / f"{name}.json").read_text()) == expected
    last = json.loads(capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)[-1])
    assert last == {"bench": name, **expected}
    page = (out / f"{name}.html").read_text()
    assert "<svg" in page and not list(outside_references(page))


def outside_references(page: str) -> Iterator[str]:
    for mark in ("src=", "href=", "url(", "@import", "<script", "<link"):
        if mark in page:
            yield mark
