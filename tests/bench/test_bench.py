"""The benchmarks' arithmetic and structure, on tiny bundles; no figure is asserted."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from motet.bench import busy, context, decode, quality, serve, speculative
from motet.bench.lib.report import Plot, table, write
from motet.bench.lib.timed import attended_positions, kv_position_bytes, random_request
from motet.bench.peers import compare as peers
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.errors import ConfigError
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.layout import decoder_layout


@pytest.fixture(scope="module")
def bundle(tiny_model_dir, tmp_path_factory):
    tails = {"a": None, "b": None}
    return export_bundle(
        tiny_model_dir("llama"), tmp_path_factory.mktemp("bench") / "tiny", tails=tails, num_tail_layers=1
    )


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).random(37).tolist()
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert serve.percentile(values, share) == pytest.approx(np.quantile(values, share))


def test_poisson_arrivals():
    times = serve.poisson_arrivals(50.0, 100.0, seed=1)
    assert times == sorted(times)
    assert times == serve.poisson_arrivals(50.0, 100.0, seed=1)
    assert abs(len(times) / 5000 - 1) < 0.05
    assert np.std(np.diff(times)) == pytest.approx(0.02, rel=0.1)


def test_summary_counts_goodput_and_failures():
    fast = serve.Measured(3, [0.1, 0.2, 0.3], 0.3)
    late = serve.Measured(3, [0.9, 1.0, 1.1], 1.1)
    failed = serve.Measured(error="OverloadedError")
    figures = serve.summary([fast, late, failed], 2.0, ttft_ms=500, tpot_ms=150)
    assert figures["goodput_s"] == 0.5
    assert figures["tokens_s"] == 3.0
    assert figures["failures"] == {"OverloadedError": 1}
    assert figures["itl_ms"]["p50"] == pytest.approx(100.0)


@pytest.mark.slow
def test_decode_report(bundle, tmp_path, capsys):
    result = decode.run(
        bundle, tmp_path, batch_sizes=[1, 2], prompt_tokens=24, context=20, new_tokens=6, repeats=1, threads=2
    )
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["decode"] == json.loads((tmp_path / "decode.json").read_text())["decode"]
    assert [(row["batch_size"], row["ensemble_size"]) for row in result["decode"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert "<svg" in (tmp_path / "decode.html").read_text()


def test_step_work(bundle):
    loaded = Bundle.load(bundle)
    one, macs = decode.step_work(loaded, 1, 1, 20, 72, native=True)
    layer = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 128
    assert macs == 4 * layer + 64 * 320
    more, _ = decode.step_work(loaded, 2, 1, 20, 72, native=True)
    assert more - one == 20 * 4 * 72


def test_a_window_bounds_the_positions_that_are_read(bundle):
    config = dataclasses.replace(Bundle.load(bundle).config, sliding_window=24, first_window_layer=1)
    layers = decoder_layout(config).layers
    assert attended_positions(layers, 20) == 4 * 20
    assert attended_positions(layers, 100) == 100 + 3 * 24


def test_bytes_of_a_position(bundle):
    loaded = Bundle.load(bundle)
    assert kv_position_bytes(loaded, EngineConfig(), native=True) == 2 * (32 + 2 * 4)  # two heads of 16, their scales
    assert kv_position_bytes(loaded, EngineConfig(kv_dtype="bf16"), native=True) == 2 * 32 * 2
    assert kv_position_bytes(loaded, EngineConfig(), native=False) == 2 * 32 * 4


def test_a_shorter_prompt_is_the_beginning_of_a_longer_one(bundle):
    loaded = Bundle.load(bundle)
    long, short = (random_request(loaded, 3, size, 1).prompts[0] for size in (50, 23))
    assert long[:23] == short


@pytest.mark.slow
def test_context_report(bundle, tmp_path, capsys):
    result = context.run(bundle, tmp_path, contexts=[24, 48, 96], new_tokens=4, repeats=1, threads=2)
    assert [row["context"] for row in result["contexts"]] == [24, 48, 96]
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["bench"] == "context"
    with pytest.raises(ConfigError, match="two contexts"):
        context.run(bundle, tmp_path, contexts=[24])


def test_a_line_is_found():
    found = context.fit([100, 200, 400], [2.0, 3.0, 5.0], 10_000)
    assert found["fixed_ms"] == pytest.approx(1.0)
    assert found["slope_us"] == pytest.approx(10.0)
    assert found["slope_gb_s"] == pytest.approx(1.0)  # 10 kB in 10 µs
    assert found["r2"] == pytest.approx(1.0)
    assert context.fit([100, 200, 300], [1.0, 3.0, 2.0], 1)["largest_deviation"] == pytest.approx(0.5)


@pytest.mark.slow
def test_busy_report(bundle, tmp_path):
    result = busy.run(bundle, tmp_path, batch_sizes=[1, 2], context=20, new_tokens=8, repeats=1, threads=2)
    assert [row["batch_size"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert row["share"] == pytest.approx(row["busy_tok_s"] / row["quiet_tok_s"])
        assert row["busy_steps"] > 0


@pytest.mark.slow
def test_drafts_report(bundle, tmp_path):
    result = speculative.run(
        bundle, tmp_path, documents=2, source_tokens=40, max_tokens=12, repeats=1, temperatures=[0.0, 1.0], threads=2
    )
    assert [(row["set"], row["temperature"]) for row in result["sets"]] == [
        *(("extract", 0.0), ("extract", 1.0), ("chat", 0.0), ("chat", 1.0))
    ]
    assert all(row["identical"] for row in result["sets"])


def test_quoted_share():
    assert speculative._quoted([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 9]]) == pytest.approx(2 / 3)
    assert speculative._quoted([[1, 2, 3]], [[1, 2, 3]]) == 0.0


@pytest.mark.slow
def test_quality_report(bundle, tmp_path, tiny_model_dir):
    model = str(tiny_model_dir("llama"))
    result = quality.run([bundle], model, tmp_path, num_tokens=100, threads=2)
    (row,) = result["rows"]
    assert row["num_tokens"] == result["tokens"] >= 100
    assert 0 <= row["kl"] < 0.1
    assert 0.5 < row["top1"] <= 1
    assert "GGUF" in result["failed"]["llama.cpp"]


@pytest.mark.slow
def test_serve_report(bundle, tmp_path):
    result = serve.run(
        bundle, tmp_path, rates=[4.0], clients=[2], duration_s=0.5, prompt_tokens=8, new_tokens=4, threads=2
    )
    assert [load["load"] for load in result["loads"]] == ["open", "closed"]
    assert all(load["failures"] == {} for load in result["loads"])
    assert result["loads"][1]["tokens_s"] > 0


@pytest.mark.slow
def test_peers_that_are_unknown_or_absent(bundle, tmp_path, tiny_model_dir):
    with pytest.raises(ConfigError, match="unknown peers"):
        peers.run([bundle], "x", tmp_path, names=["vllm"])
    with pytest.raises(ConfigError, match="same bits"):
        peers.run([bundle, bundle], "x", tmp_path)
    lengths = {"prompt_tokens": 12, "context": 12, "long_context": 24, "steps": 2, "concurrency": 2, "repeats": 1}
    model, python = str(tiny_model_dir("llama")), Path(sys.executable)
    result = peers.run([bundle], model, tmp_path, names=["CTranslate2"], python=python, **lengths)
    motet, other = result["runtimes"]
    assert motet["error"] is None and motet["errors"] == {}
    assert set(motet["tok_s"]) == {"prefill", "one", "many", "long"}
    assert other["error"].startswith("not installed")


def test_pages_are_self_contained(tmp_path):
    plot = Plot("Speed", "tok/s", ["<one>"], {"a": [1.0], "b": [2.0]})
    write("x", {"figure": 1}, [table("t", ["h"], [["<v>"]])], [plot], tmp_path)
    page = (tmp_path / "x.html").read_text()
    assert "&lt;one&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")
