"""What a bench or the demo keeps from an earlier run is used again only for the same base, data and settings."""

from __future__ import annotations

import json

import pytest
from motet.bench import demo
from motet.bench.finetune import Bench, Budget
from motet.bench.peers.worker import peer_paths
from motet.finetune.params import TuneParams
from motet.finetune.training.train import tune


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"say {i}", "completion": f"the answer is {i}"}) for i in range(20)]
    path.write_text("\n".join(lines))
    return path


def test_a_part_of_a_bench_is_measured_again_for_another_budget_model_or_data(tiny_model_dir, data, tmp_path):
    measured = []

    def part(family="llama", budget=None):
        bench = Bench(str(tiny_model_dir(family)), str(data), tmp_path / "work", budget or Budget())
        return bench.part("cache", lambda: measured.append(family) or {"number": len(measured)})["number"]

    assert [part(), part()] == [1, 1]
    assert [part(budget=Budget(examples=3)), part(budget=Budget(examples=3))] == [2, 2]
    assert part("qwen2", Budget(examples=3)) == 3
    data.write_text(data.read_text().replace("answer", "reply"))
    assert part("qwen2", Budget(examples=3)) == 4


def test_peers_convert_another_model_anew(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MOTET_HOME", str(tmp_path))
    paths = {peer_paths(str(tiny_model_dir(family)))["ctranslate2"] for family in ("llama", "qwen2", "llama")}
    assert len(paths) == 2


def test_the_demo_tunes_again_for_another_base_or_data(tiny_model_dir, data, tmp_path, monkeypatch):
    params = TuneParams(examples=8, validation_examples=2, max_length=100)
    monkeypatch.setattr(demo, "TuneParams", lambda: params)
    monkeypatch.setattr(demo, "resolve_model", lambda _name: tiny_model_dir(family))
    family, out = "llama", tmp_path / "t"
    assert not demo._is_tuned(out, str(data))
    tune(tiny_model_dir(family), str(data), out, params=params, use_cache=False, show_progress=False)
    assert demo._is_tuned(out, str(data))
    family = "qwen2"
    assert not demo._is_tuned(out, str(data))
    family = "llama"
    data.write_text(data.read_text().replace("answer", "reply"))
    assert not demo._is_tuned(out, str(data))
