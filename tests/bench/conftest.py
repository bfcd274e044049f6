"""What several files of this room run on: a small bundle, and the limits of a machine that is not measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from motet.bench.lib import probes


@pytest.fixture(scope="session")
def bundle_dir(tiny_model_dir, tmp_path_factory):
    """Members a, b.1, c and the base, two layers of their own each (of 4 with hidden 64, K and V 32, MLP 128)."""
    from motet.export.bundle_writer import export_bundle
    from motet.runtime.checkpoints.huggingface import checkpoint_digest, read_weights
    from motet.runtime.checkpoints.members.tail import write_tail

    root, model = tmp_path_factory.mktemp("bench"), tiny_model_dir("llama")
    weights = read_weights(model)
    tails: dict[str, Path | None] = {}
    for index, name in enumerate(("a", "b.1", "c")):
        layers = [n for n in weights if n.startswith(("model.layers.2", "model.layers.3"))]
        own = {n: weights[n] + 0.01 * (1 + index) for n in layers}
        own["model.norm.weight"] = weights["model.norm.weight"] * (1.1 + index)
        tails[name] = root / name
        write_tail(root / name, {"name": name, "split_layer": 2, "base": {"digest": checkpoint_digest(model)}}, own)
    return export_bundle(model, root / "bundle", tails={**tails, "base": None}, bits=8)


@pytest.fixture
def measured_limits(monkeypatch):
    """A machine of 10 GB/s and 100 GMAC/s, in place of a measurement."""
    limits = {"threads": 1, "read_gb_s": 10.0, "int8_gmac_s": 100.0}
    monkeypatch.setattr(probes, "measure", lambda _threads: limits)
