"""A mixture of experts as a bundle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import make_adapter, make_tail
from motet.export.bundle_writer import export_bundle
from motet.export.members import fuse_adapters
from motet.export.quantisation.calibration import Calibration
from motet.kernels.native import library
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.cpu.backend import CpuBackend
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.checkpoints.members.tail import read_tail, write_tail
from motet.runtime.errors import BundleError, UnsupportedModelError
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.layout import decoder_layout

pytestmark = pytest.mark.skipif(
    not library.is_available(), reason="the native kernels were not built (no C++ compiler)"
)


def test_experts_are_served_and_graphs_of_them_refused(tiny_model_dir, tmp_path):
    """Tails, updates of attention, and refusals by name of what graphs and adapters do not compute."""
    model_dir = tiny_model_dir("olmoe")
    with pytest.raises(UnsupportedModelError, match="the graphs have no experts"):
        export_bundle(model_dir, tmp_path / "b")
    tail = make_tail(model_dir, tmp_path / "tail", "tail", 1, 0.3)
    adapter = make_adapter(model_dir, tmp_path / "adapter", 2)
    chunks = [list(range(40))]
    path = export_bundle(
        model_dir,
        tmp_path / "b",
        tails={"a": tail},
        loras={"b": adapter},
        graphs=False,
        calibration=Calibration(chunks),
    )
    bundle, token_ids = Bundle.load(path), list(range(60))
    backend = CpuBackend(bundle, EngineConfig(backend="cpu", max_num_seqs=2, max_model_len=64, threads=2))
    base = read_weights(model_dir)
    own = read_tail(tail)[1]
    with torch.no_grad():
        decoder = Decoder.from_weights(read_config(model_dir), base | own).double()
        expected = decoder(torch.tensor([token_ids]))[0].numpy()
    assert np.abs(backend.score(token_ids, 0) - expected).mean() / expected.std() < 0.15
    own = {"model.layers.0.mlp.experts.1.up_proj.lora_a": np.zeros((2, 64), np.float32)}
    with pytest.raises(BundleError, match=r"this one changes .*experts\.1\.up_proj"):
        fuse_adapters(bundle_layout := decoder_layout(bundle.config), own)
    assert bundle_layout.targets == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_a_tail_that_changed_one_expert_only(tiny_model_dir, tmp_path):
    """In 4 bits: its own weights have 8, in groups of the size that the others of the layer have."""
    model_dir = tiny_model_dir("olmoe")
    manifest, own = read_tail(make_tail(model_dir, tmp_path / "all", "all", 1, 0.3))
    base = read_weights(model_dir)
    one = {n: w if ".experts.1." in n or ".experts." not in n else base[n] for n, w in own.items()}
    write_tail(tmp_path / "one", {key: manifest[key] for key in ("name", "split_layer", "base")}, one)
    path = export_bundle(model_dir, tmp_path / "b", tails={"a": tmp_path / "one", "b": None}, graphs=False, bits=4)
    backend = CpuBackend(Bundle.load(path), EngineConfig(backend="cpu", max_num_seqs=2, max_model_len=64, threads=2))
    token_ids = list(range(60))
    with torch.no_grad():
        expected = Decoder.from_weights(read_config(model_dir), base | one)(torch.tensor([token_ids]))[0].numpy()
    assert np.abs(backend.score(token_ids, 0) - expected).mean() / expected.std() < 0.8
