"""Parity as it is served: every kind of member, on the backend that serves it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from helpers.models import make_tail
from motet.export.base_model import BaseModel
from motet.export.bundle_writer import export_bundle
from motet.export.parity import HeldOut, read_parity
from motet.kernels.native import library
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends import open as backends
from motet.runtime.backends.cpu.backend import CpuBackend
from motet.runtime.backends.torch.backend import TorchBackend
from motet.runtime.checkpoints import huggingface
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import checkpoint_digest
from motet.runtime.checkpoints.members.adapter import random_adapter, write_adapter
from motet.runtime.errors import BundleError, ConfigError, NotFoundError, UnavailableError
from motet.runtime.model.bundle import Bundle

CHUNKS = [np.random.default_rng(seed).integers(0, 256, 40).tolist() for seed in range(2)]


@pytest.fixture(scope="module")
def members(tiny_model_dir, tmp_path_factory):
    """(base, tails, loras): a base, a tail and an adapter."""
    model_dir, root = tiny_model_dir("llama"), tmp_path_factory.mktemp("members")
    decoder = Decoder.from_dir(model_dir)
    adapter = random_adapter(decoder, ("q_proj", "v_proj", "down_proj"), 4, seed=3, scale=0.3)
    base = {"name": "tiny", "digest": checkpoint_digest(model_dir)}
    write_adapter(root / "x", decoder.config, adapter, {"base": base})
    return model_dir, {"t": make_tail(model_dir, root / "t", "t", 1, 0.5), "base": None}, {"x": root / "x"}


def measured(members, out, *, merge=False, bits=8, **config):
    model_dir, tails, loras = members
    text = HeldOut(CHUNKS, EngineConfig(threads=2, **config))
    return read_parity(export_bundle(model_dir, out, tails=tails, loras=loras, merge=merge, bits=bits, held_out=text))


@pytest.mark.skipif(not library.is_available(), reason="the native kernels were not built")
@pytest.mark.parametrize("merge", [False, True])
def test_every_member_is_measured_as_auto_serves_it(members, tmp_path, merge):
    report = measured(members, tmp_path / "b", merge=merge)
    assert (report.backend, report.kv_dtype, report.bits) == ("cpu", "int8", 8)
    assert [member.name for member in report.members] == ["t", "base", "x"]
    assert all(member.num_tokens == 78 for member in report.members)
    assert all(0 < member.kl < 0.1 and member.top1 > 0.8 for member in report.members)  # rounded, not another model
    nats = [member.nll for member in report.members]
    assert min(abs(a - b) for a, b in itertools.pairwise(nats)) > 0.01  # members that differ from each other
    # The report is what scoring the finished bundle gives, on the same backend.
    bundle = Bundle.load(tmp_path / "b")
    backend = CpuBackend(bundle, EngineConfig(max_num_seqs=1, max_model_len=40, threads=2))
    for index, member in enumerate(report.members):
        total = 0.0
        for chunk in CHUNKS:
            logits = backend.score(chunk, index)[:-1].astype(np.float64)
            total += float((np.log(np.exp(logits).sum(1)) - logits[np.arange(39), chunk[1:]]).sum())
        assert member.nll * (1 + member.nll_change) == pytest.approx(total / 78, rel=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpu", "onnx"])
def test_a_kept_adapter_is_measured_against_itself(members, tmp_path, backend):
    """In 32 bits with a KV cache of 16 bits or more only rounding is left; another member would be far off."""
    if backend == "cpu" and not library.is_available():
        pytest.skip("the native kernels were not built")
    kv_dtype = "float32" if backend == "onnx" else "bf16"
    config = {} if backend == "onnx" else {"kv_dtype": kv_dtype}
    report = measured(members, tmp_path / "b", bits=32, backend=backend, **config)
    assert (report.backend, report.kv_dtype) == (backend, kv_dtype)
    assert all(member.kl < 2e-3 for member in report.members)


def test_the_report_is_part_of_the_bundle(members, tmp_path):
    measured(members, tmp_path / "b", backend="torch")
    path = tmp_path / "b" / "parity.json"
    assert "parity.json" in json.loads((tmp_path / "b" / "motet.json").read_text())["files"]
    path.write_text(path.read_text() + " ")
    with pytest.raises(BundleError, match=r"parity\.json' is damaged"):
        Bundle.load(tmp_path / "b")
    path.write_text("{}")
    with pytest.raises(BundleError, match="export the bundle again"):
        read_parity(tmp_path / "b")
    path.unlink()
    with pytest.raises(NotFoundError, match="not measured"):
        read_parity(tmp_path / "b")


def test_the_base_is_read_once(members, tmp_path, monkeypatch):
    reads = []
    for name in ("read_config", "open_weights", "checkpoint_digest"):
        function = getattr(huggingface, name)

        def counted(path, name=name, function=function):
            reads.append(name)
            return function(path)

        monkeypatch.setattr(f"motet.export.base_model.{name}", counted)
    model_dir, tails, loras = members
    text = HeldOut(CHUNKS, EngineConfig(backend="torch", threads=2))
    export_bundle(BaseModel(model_dir), tmp_path / "b", tails=tails, loras=loras, bits=32, held_out=text)
    assert sorted(reads) == ["checkpoint_digest", "open_weights", "read_config"]


def test_a_bundle_without_graphs(members, tmp_path, monkeypatch):
    """The tensors are the same; backends that need graphs refuse it, and say what to do."""
    model_dir, tails, _ = members
    plain = export_bundle(model_dir, tmp_path / "plain", tails=tails)
    bare = export_bundle(model_dir, tmp_path / "bare", tails=tails, graphs=False)
    assert not list(bare.glob("*.onnx"))
    assert (bare / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    bundle, config = Bundle.load(bare), EngineConfig(max_num_seqs=1, max_model_len=40, threads=2)
    assert (bundle.graphs, bundle.has_tails, bundle.split_layer) == (None, True, 2)
    expected = TorchBackend(Bundle.load(plain), config).score(CHUNKS[0], 0)
    np.testing.assert_array_equal(TorchBackend(bundle, config).score(CHUNKS[0], 0), expected)
    with pytest.raises(ConfigError, match=r"needs graphs and 'bare' has none.*without --no-graphs"):
        backends.open_backend(bundle, EngineConfig(backend="onnx"))
    monkeypatch.setattr(library, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="'bare' has no ONNX graphs and the native kernels were not built"):
        backends.open_backend(bundle, EngineConfig())


def test_what_cannot_be_measured(members, tmp_path):
    with pytest.raises(UnavailableError, match=r"kv_dtype is int8, and the onnx backend.* --no-parity"):
        measured(members, tmp_path / "b", backend="onnx", kv_dtype="int8")
    assert not (tmp_path / "b").exists()
