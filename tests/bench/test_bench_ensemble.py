"""`motet bench ensemble` on a tiny model: the report is made of what the parts found, and finished parts are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from motet.bench import ensemble
from motet.finetune.search.search import search

pytestmark = pytest.mark.slow  # it trains


def test_the_report_and_its_parts(tiny_model_dir, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    records = ({"prompt": f"say {i}", "completion": f"the answer is {i % 3}"} for i in range(80))
    data.write_text("\n".join(map(json.dumps, records)))
    ways = {"single": ensemble.Way("lora", (0,), "trial"), "tails": ensemble.Way("tail", (1, 2), "ensemble")}
    monkeypatch.setattr(ensemble, "WAYS", ways)
    monkeypatch.setenv("COLUMNS", "200")
    counted = []
    monkeypatch.setattr(ensemble, "search", lambda *a, **k: counted.append(1) or search(*a, **k))
    budget = ensemble.Budget(
        seconds=0.5, examples=16, validation=4, fusion_validation=6, test=8, max_length=100, epochs=1, members=2
    )
    arguments = (str(tiny_model_dir("llama")), [str(data)], 1, tmp_path / "work", tmp_path / "out", budget)
    result = ensemble.run_bench(*arguments)
    (run,) = result["tasks"][str(data)]
    for name in ways:
        trained, tested = run["ways"][name], run["test"]["ways"][name]
        assert trained["training_s"] >= 0.5
        assert 1 <= len(tested["mix"]) <= 2 and sum(tested["mix"].values()) == pytest.approx(1)
        sizes = [size for size, *_ in tested["curve"]]
        assert sizes == list(range(1, len(sizes) + 1))
        best = tested["test"]["best"]
        assert tested["against_single"]["best"]["change"] == pytest.approx(
            best / run["test"]["ways"]["single"]["test"]["best"] - 1, abs=1e-6
        )
    assert run["test"]["best"] in ways
    page = (tmp_path / "out" / "ensemble.html").read_text()
    assert f"{run['test']['ways']['tails']['test']['fitted']:.4f}" in page
    seen = len(counted)
    again = ensemble.run_bench(*arguments)
    assert len(counted) == seen and again["tasks"] == result["tasks"]  # nothing is measured twice


def test_the_asymptote_of_a_power_law():
    curve = [[k, 0.0, 2.5 + 0.4 * k**-0.8] for k in range(1, 9)]
    assert ensemble._asymptote(curve) == pytest.approx(2.5, abs=1e-3)
    assert ensemble._asymptote(curve[:3]) is None
    flat = ensemble._asymptote([[k, 0.0, 2.0] for k in range(1, 9)])
    assert flat is None or np.isfinite(flat)
