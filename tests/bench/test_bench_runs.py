"""How the benches run things: loads that do or do not wait, what a step must move, and what the machine can."""

from __future__ import annotations

import asyncio
import json
import random
from functools import partial

import pytest
from motet.bench import decode, flood, scale, serve, summaries
from motet.bench.lib import aiperf, beside, probes
from motet.bench.lib import load as loads
from motet.bench.lib.servers import running_server, server_process
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.output import Output
from motet.runtime.client.connection import Connection
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError, OverloadedError, UnavailableError
from motet.runtime.model.bundle import Bundle

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
    monkeypatch.setattr(loads, "AsyncClient", cls)
    return cls


def load(times, clients, duration_s):
    return asyncio.run(serve._load("grpc", "nowhere", times, clients, duration_s, 8, 4, 320, random.Random(0)))


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
    assert loads.Measured(num_tokens=5, arrivals=[0.1, 0.5], end=0.5).tpot == pytest.approx(0.1)


def test_aiperfs_figures_have_our_names():
    times = {"p50": 1.0, "p90": 2.0, "p99": 3.0}
    names = ("time_to_first_token", "inter_chunk_latency", "inter_token_latency", "request_latency")
    exported = {name: {"unit": "ms", **times} for name in names} | {
        "aiperf_version": "1",
        "request_count": {"avg": 34.0},
        "request_throughput": {"avg": 3.3},
        "output_token_throughput": {"avg": 212.0},
    }
    own = loads.summary([loads.Measured(3, [0.1, 0.2], 0.3)], 1.0, loads.Objective())
    assert set(aiperf.figures(exported)) - {"version"} <= set(own)
    assert aiperf.figures(exported)["tpot_ms"] == times


def test_an_aiperf_that_is_not_there_is_refused(tmp_path):
    lengths = {"clients": 1, "duration_s": 1.0, "prompt_tokens": 1, "new_tokens": 1, "seed": 0}
    with pytest.raises(ConfigError, match="make aiperf"):
        aiperf.measure(tmp_path / "aiperf", "127.0.0.1:1", "m", tmp_path, **lengths)


@pytest.mark.slow
def test_a_server_that_does_not_start_is_reported(tmp_path):
    with pytest.raises(UnavailableError, match="did not start"), server_process(tmp_path / "nothing", 1):
        pass


# ---- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_decode_rows_agree_with_themselves(bundle_dir, tmp_path, measured_limits):
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


@pytest.mark.parametrize("native", [False, True])
def test_step_work_counts_each_tail_once_and_every_sequences_cache(bundle_dir, native):
    bundle, step_work = Bundle.load(bundle_dir), partial(decode.step_work, native=native)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128  # q, k, v, o; gate, up, down
    head = 64 * 320
    assert step_work(bundle, 5, 3, 16, 256)[1] == 5 * ((2 + 3 * 2) * layer + head)
    moved = {k: step_work(bundle, 5, k, 0, 256)[0] for k in (1, 2, 3, 4)}
    tail = moved[2] - moved[1]
    assert tail == moved[3] - moved[2] == moved[4] - moved[3]  # the base's own tail is stored with the shared weights
    layer, head = layer + layer // 64 * 2, head + head // 32 * 2  # scales have 16 bits
    assert tail == 2 * layer + (2 * 2 + 1) * 64 * 4  # two layers, five norms
    assert moved[1] == 4 * layer + head + (4 * 2 + 1) * 64 * 4
    assert step_work(bundle, 5, 3, 16, 256)[0] - moved[3] == 5 * 16 * (2 + 3 * 2) * 256


def test_decode_refuses_more_members_than_there_are(bundle_dir, tmp_path):
    with pytest.raises(ConfigError, match="1…4"):
        decode.run(bundle_dir, tmp_path, ensemble_sizes=(5,))


# ---- probes and report -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_probes_measure_in_a_process_that_has_an_engine(bundle_dir):
    with Engine.from_bundle(bundle_dir, EngineConfig(threads=2, max_num_seqs=1, max_model_len=64)):
        found = probes.measure(1)
    assert found["threads"] == 1
    assert 0.1 < found["read_gb_s"] < 1e4
    assert 0.1 < found["int8_gmac_s"] < 1e6


@pytest.mark.slow
def test_a_flood_of_long_prompts_is_refused_and_watched(bundle_dir, tmp_path):
    result = flood.run(bundle_dir, tmp_path, clients=3, prompt_bytes=4_000_000, duration_s=1.5, threads=1)
    assert result["refused"] >= 3
    quiet, flooded = result["loads"]["quiet"], result["loads"]["flooded"]
    assert result["gap_ratio"] == pytest.approx(flooded["gap_ms_max"] / quiet["gap_ms_max"])
    assert min(quiet["messages"], flooded["messages"]) > 10
    kept = json.loads((tmp_path / "flood.json").read_text())
    assert kept.pop("page") and kept == result


@pytest.mark.slow
def test_what_streams_notice_of_other_clients(bundle_dir):
    options = ["--max-num-seqs", "16", "--max-model-len", "512"]
    with running_server(bundle_dir, 1, options) as server:
        connection = Connection(server.address)
        found = beside.slow_readers(server, connection, 1.0)
        many = beside.beside_many_requests({"a": connection, "b": connection}, 1.0, 1)
    assert list(found) == ["read", "not read on"]
    for figures in found.values():
        assert figures["gap p99, ms"] >= figures["gap p50, ms"] > 0 and figures["tok/s"] > 0
        assert figures["memory at most, MB"] >= 50
    assert many["share"] == many["ways"]["b"][0] / many["ways"]["a"][0] and min(many["ways"]["a"]) > 0


# ---- scale, summaries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtbf_days", [0.02, 0.5, 7])
def test_the_capacity_model_is_what_the_simulation_gives(mtbf_days):
    plan = scale.Plan(200_000, rate=5.0, mtbf_s=mtbf_days * 86_400)
    simulated = [scale.simulate(plan, seed) for seed in range(5)]
    assert sum(simulated) / 5 == pytest.approx(plan.hours, rel=0.1)
    assert plan.hours <= 24 * (1 - plan.spare) * 1.01
    assert scale.Plan(200_000, rate=5.0, mtbf_s=60.0).engines > plan.engines


def test_a_rate_is_that_between_the_parts():
    assert scale._rate([(10.0, 64), (12.0, 128), (14.0, 256)]) == pytest.approx((256 - 64) / 4)


def test_documents_are_docstrings_without_their_first_paragraph():
    found = {name: (reference, text) for name, reference, text in summaries._modules()}
    assert len(found) > 50
    assert all(len(reference.split()) >= 8 for reference, _ in found.values())
    held = [reference in " ".join(text.split()) for reference, text in found.values()]
    assert sum(held) < len(held) / 20, "some modules say it again"
    assert summaries._sentences("One. Two three? Four") == ["One.", "Two three?", "Four"]
    assert summaries._rouge("a b c", "a b c") == 1.0
