"""A model with a context of 256 positions, below every default: defaults adapt to it, and a value above it is refused
before any work."""

from __future__ import annotations

import io
import json
import sys

import pytest
from motet.cli import main
from motet.export.bundle_writer import export_bundle
from motet.export.parity import HeldOut, read_parity
from motet.export.quantisation.calibration import Calibration
from motet.runtime.api.config import EngineConfig
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError
from safetensors.torch import load_file, save_file

CONTEXT = 256


@pytest.fixture
def short(tiny_model_dir, tmp_path):
    """family → a model directory with this context."""
    import shutil

    def make(family):
        path = shutil.copytree(tiny_model_dir(family), tmp_path / family)
        config = json.loads((path / "config.json").read_text())
        config["n_positions" if family == "gpt2" else "max_position_embeddings"] = CONTEXT
        (path / "config.json").write_text(json.dumps(config))
        weights = load_file(path / "model.safetensors")
        if family == "gpt2":
            weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:CONTEXT].clone()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lengths = [30 + 11 * i for i in range(40)]  # bytes, and tokens: some answers are longer than the context
    path.write_text(
        "\n".join(json.dumps({"prompt": f"say {i}", "completion": f"{i} " * (n // 3)}) for i, n in enumerate(lengths))
    )
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments) → (exit code, stdout, stderr) of a command in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["motet", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tuned_and_exported_and_served_at_defaults(short, data, tmp_path, command, monkeypatch, family):
    monkeypatch.setenv("MOTET_HOME", str(tmp_path / "home"))
    model, tail, bundle = short(family), tmp_path / "tail", tmp_path / "bundle"
    tuning = ["tune", model, "--data", data, "--out", tail, "--examples", "12", "--epochs", "1"]
    assert command(*tuning)[0] == 0
    manifest = json.loads((tail / "tail.json").read_text())
    assert manifest["hyper_parameters"]["max_length"] == CONTEXT
    assert manifest["data"]["parts"]["train"]["longest"] <= CONTEXT
    code, _, error = command("export", model, bundle, "--tail", f"t={tail}", "--tail", "base")
    assert code == 0, error
    assert all(member.num_tokens >= 4096 for member in read_parity(bundle).members)
    with Engine.from_bundle(bundle, EngineConfig(threads=1, max_num_seqs=1)) as engine:
        assert engine.model.max_model_len == CONTEXT


def test_a_value_above_the_context_is_refused(short, data, tmp_path, command):
    model = short("llama")
    for name in ("tune", "search"):
        code, _, error = command(name, model, "--data", data, "--out", tmp_path / name, "--max-length", "257")
        assert (code, error) == (2, "motet: max_length must be at most 256, the model's context, got 257\n")
        assert not (tmp_path / name).exists()
    bundle = export_bundle(model, tmp_path / "bundle", graphs=False)
    with pytest.raises(ConfigError, match="max_model_len must be at most 256"):
        Engine.from_bundle(bundle, EngineConfig(max_model_len=2048, threads=1))
    code, _, error = command("serve", bundle, "--port", "0", "--max-model-len", "2048")
    assert code == 2
    assert "max_model_len must be at most 256, the model's context, got 2048" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": Calibration([[1] * 257])}, "calibration text has 2 to 256"),
        ({"held_out": HeldOut([[1] * 20, [1] * 257])}, "chunk 1 has 257"),
        ({"held_out": HeldOut([[1]])}, "chunk 0 has 1"),
        ({"held_out": HeldOut([[1, 320]])}, r"in 0…319, chunk 0 of the held-out text has 1…320"),
    ],
)
def test_chunks_are_checked_before_the_weights_are_read(short, tmp_path, options, message):
    model = short("llama")
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        export_bundle(model, tmp_path / "b", **options)


def test_targets_are_checked_before_the_trunk_is_run(short, data, tmp_path, command):
    model = short("gpt2")
    (model / "model.safetensors").write_bytes(b"")
    tuning = ["tune", model, "--data", data, "--out", tmp_path / "t", "--method", "lora", "--targets", "gate_proj"]
    code, _, error = command(*tuning)
    assert code == 2
    assert "targets must be some of" in error
