"""Data sets and tuning, on tiny models."""

from __future__ import annotations

import json

import pytest
import torch
from motet.export.bundle_writer import export_bundle
from motet.export.parity import HeldOut, read_parity
from motet.finetune.data.dataset import heldout_token_ids, load_dataset
from motet.finetune.training.train import TuneParams, tune
from motet.runtime.api.config import EngineConfig
from motet.runtime.checkpoints.huggingface import read_weights
from motet.runtime.checkpoints.members.tail import read_tail
from motet.runtime.errors import BundleError, ConfigError, DataError

PARAMS = TuneParams(layers=2, examples=40, validation_examples=8, epochs=4, learning_rate=3e-3, max_length=100)


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOTET_HOME", str(tmp_path / "home"))  # the default trunk cache lies there


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"prompt": f"say {i}", "completion": f"the answer is {i % 3}"} for i in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.slow
def test_tuning_lowers_the_loss_and_touches_only_the_tail(tiny_model_dir, data, tmp_path):
    model_dir = tiny_model_dir("llama")
    manifest = tune(model_dir, data, tmp_path / "tail", params=PARAMS, show_progress=False)
    metrics = manifest["metrics"]
    assert metrics["validation_loss_after"] < 0.8 * metrics["validation_loss_before"]
    stored, weights = read_tail(tmp_path / "tail")
    assert stored["split_layer"] == 2
    assert {name.split(".")[2] for name in weights if "layers" in name} == {"2", "3"}
    base = read_weights(model_dir)
    assert any(not torch.equal(weights[name], base[name]) for name in weights)
    again = tune(model_dir, data, tmp_path / "again", params=PARAMS, show_progress=False)
    assert again["metrics"] == metrics


@pytest.mark.slow
def test_from_tail_to_parity(tiny_model_dir, data, tmp_path, tokenizer):
    model_dir = tiny_model_dir("llama")
    tune(model_dir, data, tmp_path / "tail", params=PARAMS, show_progress=False)
    tails = {"base": None, "tuned": tmp_path / "tail"}
    chunks = [tokenizer.encode(f"say {i}; the answer is {i % 3}") for i in range(3)]
    held_out = HeldOut(chunks, EngineConfig(backend="onnx", threads=2))  # its KV cache does not round
    parity = read_parity(export_bundle(model_dir, tmp_path / "bundle", tails=tails, bits=32, held_out=held_out))
    assert [member.name for member in parity.members] == ["base", "tuned"]
    assert all(abs(member.kl) < 1e-5 and member.top1 > 0.98 for member in parity.members)
    assert parity.overhead < 1.1


@pytest.mark.slow
def test_a_tail_of_another_base_is_refused(tiny_model_dir, data, tmp_path):
    tune(tiny_model_dir("llama"), data, tmp_path / "tail", params=PARAMS, show_progress=False)
    with pytest.raises(BundleError, match="was trained on a base"):
        export_bundle(tiny_model_dir("llama-untied"), tmp_path / "b", tails={"x": tmp_path / "tail"})
    weights = tmp_path / "tail" / "tail.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(BundleError, match="damaged"):
        read_tail(tmp_path / "tail")


@pytest.mark.slow
def test_built_in_sets():
    for name in ("stdlib-code", "stdlib-docs"):
        dataset = load_dataset(name)
        sources = [{example.source for example in part} for part in dataset.splits.values()]
        assert sum(len(part) for part in dataset.splits.values()) > 600
        assert not sources[0] & sources[1]
        assert not sources[0] & sources[2]
        assert not sources[1] & sources[2]
    example = load_dataset("stdlib-code").splits["train"][0]
    assert example.completion not in example.messages[0]["content"]


@pytest.mark.slow
def test_heldout_text(tokenizer):
    for context, longest in ((2048, 512), (100, 100)):
        chunks = heldout_token_ids(tokenizer, 4000, context=context)
        assert sum(len(chunk) - 1 for chunk in chunks) >= 4000
        assert max(map(len, chunks)) == longest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff", "completion": "x"}', "line 2: not UTF-8 at byte 12"),
        (b"not json", "line 2: not JSON"),
        (b"[]", "line 2: a list"),
        (b'{"prompt": "x"}', "line 2: has the keys"),
        (b'{"prompt": "x", "completion": " "}', "the answer is empty"),
        (
            b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
            "must be the assistant's",
        ),
    ],
)
def test_malformed_records(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "x", "completion": "y"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        load_dataset(str(path))


def test_bad_settings(tiny_model_dir, data, tmp_path):
    with pytest.raises(ConfigError, match="layers must be at most 4"):
        tune(tiny_model_dir("llama"), data, tmp_path / "t", params=TuneParams(layers=5), show_progress=False)
    with pytest.raises(ConfigError, match="learning_rate"):
        TuneParams(learning_rate=float("nan"))
    with pytest.raises(DataError, match="max_length"):
        tune(tiny_model_dir("llama"), data, tmp_path / "t", params=TuneParams(max_length=3), show_progress=False)
