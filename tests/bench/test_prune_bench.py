"""`motet bench prune` on a tiny model: the steps, their figures, and that a second call measures on what is there."""

from __future__ import annotations

import json

import pytest
from motet.bench.prune import equal_answers, run_bench
from motet.runtime.checkpoints.huggingface import checkpoint_digest

pytestmark = [pytest.mark.slow, pytest.mark.native]


def test_answers_are_compared(tiny_model_dir):
    one, other = tiny_model_dir("llama"), tiny_model_dir("qwen2")
    assert equal_answers(one, one, ["a", "b c"]) == {"prompts": 2, "equal": 2}
    assert equal_answers(one, other, ["a", "b c"]) == {"prompts": 2, "equal": 0}


def test_steps_and_figures(tiny_model_dir, tmp_path):
    data = tmp_path / "data.jsonl"
    records = ({"prompt": f"say {i}", "completion": f"the answer is {i % 3}"} for i in range(60))
    data.write_text("\n".join(map(json.dumps, records)))
    model, settings = str(tiny_model_dir("llama")), {"examples": 8, "test_examples": 4, "epochs": 1, "repeats": 1}
    result = run_bench(model, str(data), tmp_path / "work", tmp_path / "out", **settings)
    original, pruned, healed, trimmed = result["rows"]
    assert [row["layers"] for row in result["rows"]] == [4, 3, 3, 3]
    assert [row["vocabulary"] for row in result["rows"]] == [320, 320, 320, 259]
    assert original["parameters"] > pruned["parameters"] == healed["parameters"] > trimmed["parameters"]
    assert original["bundle_bytes"] > pruned["bundle_bytes"] > trimmed["bundle_bytes"]
    # Tokens that no text has are no longer probable.
    assert 0 < trimmed["bits_per_byte"] < healed["bits_per_byte"] != pruned["bits_per_byte"]
    assert all(speed > 0 for row in result["rows"] for speed in row["tokens_per_s"])
    assert json.loads((tmp_path / "out" / "prune.json").read_text())["rows"] == result["rows"]
    assert result["equal_answers"]["prompts"] == 55  # of random weights, whose answers are soon outside of the texts
    assert [row["name"][:4] for row in result["masks"]] == ["half", "half", "2 of"]
    assert all(row["bits_per_byte"] != original["bits_per_byte"] for row in result["masks"])
    before = checkpoint_digest(tmp_path / "work" / "trimmed")
    again = run_bench(model, str(data), tmp_path / "work", tmp_path / "out", **settings)
    assert checkpoint_digest(tmp_path / "work" / "trimmed") == before
    assert [row["bits_per_byte"] for row in again["rows"]] == [row["bits_per_byte"] for row in result["rows"]]
