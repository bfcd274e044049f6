"""The benchmarks' arithmetic and reports, on tiny bundles and a clock of the tests' own."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import make_adapter
from motet import pages
from motet.bench import busy, context, decode, fine_tunes, quality, serve, speculative
from motet.bench.lib import load as loads
from motet.bench.lib import probes, timed
from motet.bench.lib.load import Measured, Objective
from motet.bench.lib.report import draw, write
from motet.bench.lib.timed import attended_positions, kv_position_bytes, random_request
from motet.bench.peers import compare as peers
from motet.export.bundle_writer import export_bundle
from motet.finetune.data.dataset import heldout_token_ids
from motet.pages import Bars, Lines, Table
from motet.runtime.api.config import EngineConfig
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.errors import ConfigError, DataError
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.layout import decoder_layout
from motet.runtime.text.tokenizer import Tokenizer

LIMITS = {"threads": 2, "read_gb_s": 10.0, "int8_gmac_s": 100.0}
LAYER = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 128  # multiply-accumulates of a layer of the tiny model


@pytest.fixture
def clock(monkeypatch):
    """A step takes `cost(batch)` seconds, whatever the machine does. The machine's limits are `LIMITS`."""
    found = SimpleNamespace(cost=lambda _batch: 0.004)

    note = timed.StepTimer.on_step
    monkeypatch.setattr(
        timed.StepTimer,
        "on_step",
        lambda timer, step: note(timer, dataclasses.replace(step, seconds=found.cost(step.batch))),
    )
    monkeypatch.setattr(probes, "measure", lambda _threads: LIMITS)
    return found


def words(path: Path) -> str:
    """The text of a report's tables, in one line without rules and markup."""
    page = path.read_text().partition("<details>")[0]
    return " ".join(re.sub(r"<[^>]*>|[─-╿]", " ", html.unescape(page)).split())


@pytest.fixture(scope="module")
def bundle(tiny_model_dir, tmp_path_factory):
    tails = {"a": None, "b": None}
    return export_bundle(
        tiny_model_dir("llama"), tmp_path_factory.mktemp("bench") / "tiny", tails=tails, num_tail_layers=1
    )


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).random(37).tolist()
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert loads.percentile(values, share) == pytest.approx(np.quantile(values, share))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_gamma_distributed_gaps(burstiness):
    times = loads.arrival_times(50.0, 400.0, 1, burstiness)
    assert times == sorted(times)
    assert times == loads.arrival_times(50.0, 400.0, 1, burstiness)
    assert abs(len(times) / 20_000 - 1) < 0.05
    assert np.std(np.diff(times)) == pytest.approx(0.02 / burstiness**0.5, rel=0.1)


def test_summary_counts_goodput_and_failures():
    fast = Measured(3, [0.1, 0.2, 0.3], 0.3)
    late = Measured(3, [0.9, 1.0, 1.1], 1.1)
    failed = Measured(error="OverloadedError")
    figures = loads.summary([fast, late, failed], 2.0, Objective(ttft_ms=500, tpot_ms=150))
    assert figures["goodput_s"] == 0.5
    assert figures["tokens_s"] == 3.0
    assert figures["failures"] == {"OverloadedError": 1}
    assert figures["icl_ms"]["p50"] == pytest.approx(100.0)


@pytest.mark.slow
def test_decode_report(bundle, tmp_path, capsys, clock):
    """Steps of 4 ms a sequence of the batch, 1 ms more for a second member."""
    clock.cost = lambda batch: 0.004 * batch.num_seqs + 0.001 * (len(batch.members[0]) - 1)
    result = decode.run(
        bundle, tmp_path, batch_sizes=[1, 2], prompt_tokens=24, context=20, new_tokens=6, repeats=1, threads=2
    )
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["decode"] == json.loads((tmp_path / "decode.json").read_text())["decode"] == result["decode"]
    shown = words(tmp_path / "decode.html")
    expected = {(1, 1): 4, (1, 2): 5, (2, 1): 8, (2, 2): 9}  # ms
    assert [(row["batch_size"], row["ensemble_size"]) for row in result["decode"]] == list(expected)
    for row, ((size, members), ms) in zip(result["decode"], expected.items(), strict=True):
        ratio, tok_s = ms / expected[size, 1], 1000 * size / ms
        macs = size * ((3 + members) * LAYER + 64 * 320)
        assert row["step_ms"] == pytest.approx(ms)
        assert row["tok_s"] == pytest.approx(tok_s)
        assert row["ratio_to_one_member"] == pytest.approx(ratio)
        assert row["macs"] == macs
        assert row["share_of_int8"] == pytest.approx(macs / (ms * 1e8))
        assert row["share_of_bandwidth"] == pytest.approx(row["bytes"] / (ms * 1e7))
        assert f"{size} {members} {ms:.2f} {tok_s:,.0f} {ratio:.2f}" in shown
    assert f"prefill {24 / 0.004:,.0f} tok/s" in shown


def test_step_work(bundle):
    loaded = Bundle.load(bundle)
    one, macs = decode.step_work(loaded, 1, 1, 20, 72, native=True)
    layer = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 128
    assert macs == 4 * layer + 64 * 320
    more, _ = decode.step_work(loaded, 2, 1, 20, 72, native=True)
    assert more - one == 20 * 4 * 72


def test_step_work_of_low_rank_members(tiny_model_dir, tmp_path):
    """Their bytes are those of A and B without B's empty blocks; the base's weights are read once."""
    loras = {name: make_adapter(tiny_model_dir("llama"), tmp_path / name, 1, rank=4, layers=2) for name in "xy"}
    export_bundle(tiny_model_dir("llama"), tmp_path / "b", loras=loras, graphs=False)
    loaded = Bundle.load(tmp_path / "b")
    one, macs = decode.step_work(loaded, 1, 1, 20, 72, native=True)
    two, more = decode.step_work(loaded, 1, 2, 20, 72, native=True)
    inputs = 4 * (3 * 64 + 64 + 2 * 64 + 128)  # A of q, k, v, of out, of gate and up, of down
    outputs = 4 * (128 + 64 + 256 + 64)
    assert two - one == 2 * (inputs + outputs) + 20 * 2 * 72
    assert more - macs == 2 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 128)


def test_a_window_bounds_the_positions_that_are_read(bundle):
    config = dataclasses.replace(Bundle.load(bundle).config, sliding_window=24, window_layers=(1, 2, 3))
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
def test_context_report(bundle, tmp_path, capsys, clock):
    """Steps of 1 ms and 10 µs a position: the line is found again."""
    clock.cost = lambda batch: 1e-3 + 1e-5 * float(batch.context_lens.max())
    result = context.run(bundle, tmp_path, contexts=[24, 48, 96], new_tokens=4, repeats=1, threads=2)
    assert {row["context"]: row["ms"] for row in result["contexts"]} == pytest.approx({24: 1.24, 48: 1.48, 96: 1.96})
    assert (result["fixed_ms"], result["slope_us"], result["r2"]) == pytest.approx((1.0, 10.0, 1.0))
    position = 4 * 2 * (32 + 2 * 4)  # layers, keys and values: two heads of 16 bytes and their scales
    assert result["position_bytes"] == position
    assert result["share_of_bandwidth"] == pytest.approx(position / 1e-5 / 10e9)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["bench"] == "context"
    shown = words(tmp_path / "context.html")
    assert "1.00 ms + 10.000 µs per position" in shown
    assert "24 1.24 806 1.24" in shown and "96 1.96 510 1.96" in shown
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
def test_busy_report(bundle, tmp_path, monkeypatch, clock):
    """Steps of 4 ms, 10 ms while the other process runs."""
    burner = busy.burner

    @contextmanager
    def slower():
        with burner():
            clock.cost = lambda _batch: 0.010
            yield
        clock.cost = lambda _batch: 0.004

    monkeypatch.setattr(busy, "burner", slower)
    result = busy.run(bundle, tmp_path, batch_sizes=[1, 2], context=20, new_tokens=8, repeats=1, threads=2)
    shown = words(tmp_path / "busy.html")
    assert [row["batch_size"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        size = row["batch_size"]
        assert (row["quiet_tok_s"], row["busy_tok_s"]) == pytest.approx((250 * size, 100 * size))
        assert (row["quiet_worst_ms"], row["busy_worst_ms"], row["share"]) == pytest.approx((4, 10, 0.4))
        assert 0 < row["busy_steps"] <= 7  # the first of the 8 tokens is drawn with the prompt
        assert f"{size} {250 * size} {100 * size} 40% 4.0 10.0 {row['busy_steps']}" in shown


@pytest.mark.slow
def test_fine_tunes_report(tiny_model_dir, tmp_path, clock):
    """Each bundle is measured in a process of its own; the ratios are those of its rows."""
    traffic = fine_tunes.Traffic(members=2, streams=2, rounds=3, document=40, question=4, answer=4)
    result = fine_tunes.run(str(tiny_model_dir("llama")), tmp_path, traffic=traffic, layers=2, threads=2)
    base, members = result["rows"]["one model"], result["rows"]["fine-tunes"]
    ratios = [b["tok_s"] / a["tok_s"] for a, b in zip(*result["rounds"].values(), strict=True)]
    assert len(ratios) == 3 and result["throughput_ratio"] == sorted(ratios)[1]
    assert result["memory_ratio"] == members["peak_bytes"] / base["peak_bytes"]
    assert all(value > 0 for row in (base, members) for value in row.values())
    shown = words(tmp_path / "fine-tunes.html")
    assert "2 fine-tunes of" in shown and f"{members['peak_bytes'] / 1e6:,.0f}" in shown


@pytest.mark.slow
def test_drafts_report(bundle, tmp_path):
    result = speculative.run(
        bundle, tmp_path, documents=2, source_tokens=40, max_tokens=12, repeats=1, temperatures=[0.0, 1.0], threads=2
    )
    assert [(row["set"], row["temperature"]) for row in result["sets"]] == [
        *(("extract", 0.0), ("extract", 1.0), ("chat", 0.0), ("chat", 1.0))
    ]
    shown = words(tmp_path / "speculative.html")
    for row in result["sets"]:
        assert row["identical"]
        assert row["requests"] == 2
        assert 2 <= row["tokens"] <= 2 * 12
        figures = f"{row['quoted']:.0%} {row['off_tok_s']:,.0f} {row['on_tok_s']:,.0f} {row['decode_ratio']:.2f}"
        assert f"{row['set']} {row['temperature']:g} {row['tokens']} {figures}" in shown


def test_quoted_share():
    assert speculative._quoted([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 9]]) == pytest.approx(2 / 3)
    assert speculative._quoted([[1, 2, 3]], [[1, 2, 3]]) == 0.0


@pytest.mark.slow
def test_quality_report(bundle, tmp_path, tiny_model_dir):
    model = str(tiny_model_dir("llama"))
    result = quality.run([bundle], model, tmp_path, num_tokens=100, threads=2)
    (row,) = result["rows"]
    decoder, losses = Decoder.from_dir(tiny_model_dir("llama")), []
    for chunk in heldout_token_ids(Tokenizer.from_dir(bundle), 100, context=512):
        with torch.no_grad():
            logprobs = decoder(torch.tensor([chunk[:-1]]))[0].log_softmax(-1)
        losses.append(-logprobs.gather(1, torch.tensor(chunk[1:])[:, None]))
    assert row["num_tokens"] == result["tokens"] == sum(map(len, losses)) >= 100
    assert row["nll"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert 0 < row["kl"] < 0.1
    assert 0.5 < row["top1"] <= 1
    shown = words(tmp_path / "quality.html")
    assert f"motet tiny {row['nll']:.3f} {row['nll_change']:+.2%} {row['kl']:.4f} {row['top1']:.1%}" in shown
    assert "GGUF" in result["failed"]["llama.cpp"]


@pytest.mark.slow
def test_serve_report(bundle, tmp_path):
    lengths = {"prompt_tokens": 8, "new_tokens": 4, "duration_s": 0.5}
    result = serve.run(
        bundle, tmp_path, doors=["grpc", "http"], rates=[4.0], clients=[2], repeats=2, threads=2, **lengths
    )
    found = [(load["door"], load["load"]) for load in result["loads"]]
    assert found == [("grpc", "open"), ("http", "open"), ("grpc", "closed"), ("http", "closed")]
    records = [json.loads(line) for line in (tmp_path / "serve.jsonl").read_text().splitlines()]
    for load in result["loads"]:
        assert load["failures"] == {}
        own = [r for r in records if (r["door"], r["load"]) == (load["door"], load["load"])]
        assert [sum(r["repeat"] == repeat for r in own) for repeat in range(2)] == [
            one["requests"] for one in load["repeats"]
        ]
        assert all(r["tokens"] == 4 and r["error"] is None and r["arrivals_ms"] for r in own)
        for one in load["repeats"]:
            assert one["requests_s"] * one["seconds"] == pytest.approx(one["requests"])
            assert one["tokens_s"] * one["seconds"] == pytest.approx(4 * one["requests"])  # new_tokens of each
            assert 0 < one["ttft_ms"]["p50"] <= one["e2e_ms"]["p50"]
        rates = sorted(one["tokens_s"] for one in load["repeats"])
        assert rates[0] <= load["tokens_s"] <= rates[1]
    assert words(tmp_path / "serve.html").count("http, open, 4 req/s") >= 1


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
    parts = [
        Table("t <1>", ["h", "n"], [["<v>", "1"]]),
        Bars(
            "A < B & C", "tok/s", ["<one>", "two"], {"a": [1.0, 4.0], "b": [2.0, 0.0]}, {"a": [[0.5, 2.0], [4.0, 4.0]]}
        ),
        Lines("Time", ("ms", "share"), {"a <x>": [[1.0, 0.5], [2.0, 1.0]], "b": [[1.0, 1.0]]}, is_log=True),
    ]
    write("x", {"figure": 1}, parts, tmp_path)
    page = (tmp_path / "x.html").read_text()
    for text in ("t &lt;1&gt;", "&lt;v&gt;", "&lt;one&gt;", "a &lt;x&gt;"):
        assert text in page
    assert "<script" not in page and not re.search(r"(src|href)=.?https?:", page.replace("http://www.w3.org", ""))
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", page, re.DOTALL)]
    assert [chart.get("aria-label") for chart in charts] == ["A < B & C (tok/s)", "Time"]
    shown = [element.text for element in charts[0].iter("{http://www.w3.org/2000/svg}text")]
    assert {"<one>", "two", "A < B & C", "tok/s", "4", "0"} <= set(shown)  # every value is written at its bar


def test_pages_are_drawn_anew_from_their_json_and_listed(tmp_path):
    write("x", {"figure": 1, "machine": {"cpu": "Z80", "cores": 1}}, [Table("t", ["h"], [["v"]])], tmp_path)
    (tmp_path / "y.json").write_text('{"figure": 2}')
    before = (tmp_path / "x.html").read_text()
    (tmp_path / "x.html").unlink()
    assert draw(tmp_path) == 2
    assert (tmp_path / "x.html").read_text() == before
    index = (tmp_path / "index.html").read_text()
    assert 'href="x.html"' in index and "Z80, 1 cores" in index and 'href="y.html"' in index
    (tmp_path / "z.json").write_text("[1]")
    with pytest.raises(DataError, match=r"z\.json is not a result"):
        draw(tmp_path)


def test_our_bars_are_sorted_among_the_others():
    values = {"median": [1.0, 3.0, 2.0]}
    page = pages.page("p", [Bars("speed", "tok/s", ["a", "motet b", "c"], values, ours="motet ")])
    places = [page.index(f">{label}<") for label in ("motet b", "c", "a")]
    assert places == sorted(places)
