"""The benchmarks' arithmetic and structure, on tiny bundles; no figure is asserted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from motet.bench import decode, peers, serve
from motet.bench.report import Plot, table, write
from motet.export.bundle_writer import export_bundle
from motet.runtime.bundle import Bundle
from motet.runtime.errors import ConfigError


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
    one, macs = decode.step_work(loaded, 1, 1, 20)
    layer = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 128
    assert macs == 4 * layer + 64 * 320
    more, _ = decode.step_work(loaded, 2, 1, 20)
    assert more - one == 20 * 4 * 2 * 32 * 4


def test_serve_report(bundle, tmp_path):
    result = serve.run(
        bundle, tmp_path, rates=[4.0], clients=[2], duration_s=0.5, prompt_tokens=8, new_tokens=4, threads=2
    )
    assert [load["load"] for load in result["loads"]] == ["open", "closed"]
    assert all(load["failures"] == {} for load in result["loads"])
    assert result["loads"][1]["tokens_s"] > 0


def test_peers_that_are_unknown_or_absent(bundle, tmp_path, tiny_model_dir):
    with pytest.raises(ConfigError, match="unknown peers"):
        peers.run(bundle, "x", tmp_path, names=["vllm"])
    model = str(tiny_model_dir("llama"))
    result = peers.run(
        bundle,
        model,
        tmp_path,
        names=["CTranslate2"],
        prompt_tokens=12,
        context=12,
        new_tokens=4,
        concurrency=2,
        repeats=1,
    )
    motet, other = result["peers"]
    assert motet["error"] is None
    assert set(peers.FIGURES) <= set(motet)  # on a tiny model a difference of two times may be negative
    assert other["error"].startswith("not installed")


def test_pages_are_self_contained(tmp_path):
    plot = Plot("Speed", "tok/s", ["<one>"], {"a": [1.0], "b": [2.0]})
    write("x", {"figure": 1}, [table("t", ["h"], [["<v>"]])], [plot], tmp_path)
    page = (tmp_path / "x.html").read_text()
    assert "&lt;one&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")
