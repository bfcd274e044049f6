"""Bundles whose bits and values calibration text has chosen."""

from __future__ import annotations

import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from helpers.models import EXPERTS, make_tail
from motet.export.base_model import BaseModel
from motet.export.bundle_writer import export_bundle
from motet.export.parity import HeldOut, read_parity
from motet.export.quantisation import calibration as calibration_module
from motet.export.quantisation.calibration import Calibration, QuantisationConfig
from motet.export.quantisation.method import Method, Target
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.open import open_backend
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.errors import ConfigError
from motet.runtime.model.bundle import WEIGHTS, Bundle
from motet.runtime.model.layout import EMBEDDING, decoder_layout
from motet.runtime.model.stored import stored_tensors, stored_weight

CHUNKS = [np.random.default_rng(seed).integers(0, 320, 128).tolist() for seed in range(3)]
TEXT = Calibration(CHUNKS)
TOKENS = np.random.default_rng(9).integers(0, 320, 90).tolist()


def score(path, backend, member=0):
    config = EngineConfig(backend=backend, max_num_seqs=1, max_model_len=256, threads=2)
    opened = open_backend(Bundle.load(path), config)
    try:
        return opened.score(TOKENS, member)
    finally:
        opened.close()


def kl(found, expected):
    p, q = (torch.from_numpy(np.ascontiguousarray(logits)).double().log_softmax(-1) for logits in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def page(model_dir):
    with torch.no_grad():
        return Decoder.from_dir(model_dir)(torch.tensor([TOKENS]))[0].numpy()


def schemes(path):
    bundle, tensors = Bundle.load(path), stored_tensors(path / WEIGHTS)
    layout = decoder_layout(bundle.config)
    names = [*(f"{linear.name}.weight" for linear in layout.linears), EMBEDDING, layout.head]
    return {name: stored_weight(tensors, name) for name in names}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
@pytest.mark.parametrize("bits", [4.6, 6.5])
def test_a_target_of_bits_on_every_backend(tiny_model_dir, tmp_path, family, bits):
    path = export_bundle(
        tiny_model_dir(family), tmp_path / "b", target=Target(bits=bits), method=Method.GPTQ, calibration=TEXT
    )
    bundle, weights = Bundle.load(path), schemes(path)
    tensors = stored_tensors(path / WEIGHTS)
    size = sum(tensors[name].length for weight in weights.values() for name in weight.tensors)
    count = sum(weight.rows * weight.columns for weight in weights.values())
    assert 8 * size / count <= bits
    assert bundle.quantisation["average_bits"] == pytest.approx(8 * size / count, abs=1e-3)
    assert (
        len({(weight.bits, weight.group_size) for weight in weights.values()}) > 1
    )  # the budget lies between two schemes
    assert set(bundle.quantisation["expected_kl"]) == set(weights)
    native, onnx, torch_ = (score(path, backend) for backend in ("cpu", "onnx", "torch"))
    spread = native.std()
    assert np.abs(onnx - native).mean() < 0.05 * spread
    assert np.abs(torch_ - native).mean() < 0.05 * spread
    assert kl(native, page(tiny_model_dir(family))) < 10 * sum(bundle.quantisation["expected_kl"].values()) + 1e-3


def test_a_target_of_megabytes_and_of_kl(tiny_model_dir, tmp_path):
    model = tiny_model_dir("llama")
    path = export_bundle(model, tmp_path / "mb", target=Target(megabytes=0.3), calibration=TEXT)
    header = 8 + int.from_bytes((path / WEIGHTS).open("rb").read(8), "little")
    assert 0.2e6 < (path / WEIGHTS).stat().st_size - header <= 0.3e6
    small = export_bundle(model, tmp_path / "small", target=Target(kl=0.02), calibration=TEXT)
    large = export_bundle(model, tmp_path / "large", target=Target(kl=0.003), calibration=TEXT)
    sizes = [(bundle / WEIGHTS).stat().st_size for bundle in (small, large)]
    assert sizes[0] < sizes[1]
    found = [sum(Bundle.load(bundle).quantisation["expected_kl"].values()) for bundle in (small, large)]
    assert found[0] < 0.02 * 1.1  # the plan is made with fewer ranges than the values
    assert found[1] < 0.003 * 1.1


def test_calibrated_methods_lose_less_at_the_same_size(tiny_model_dir, tmp_path):
    model, found = tiny_model_dir("llama"), {}
    for method in Method:
        path = export_bundle(
            model,
            tmp_path / method,
            bits=4,
            group_size=32,
            method=method,
            graphs=False,
            calibration=None if method is Method.ROUND else TEXT,
        )
        found[method] = kl(score(path, "cpu"), page(model))
    assert found[Method.SEARCH] < found[Method.ROUND]
    assert found[Method.GPTQ] < found[Method.SEARCH]
    assert found[Method.AWQ] < found[Method.ROUND]


def test_a_single_tail_is_quantised_as_the_base_is(tiny_model_dir, tmp_path):
    model = tiny_model_dir("llama")
    tail = make_tail(model, tmp_path / "tail", "tail", 1, 0.1)
    options = {"tails": {"a": tail}, "graphs": False}
    path = export_bundle(model, tmp_path / "b", bits=4, method=Method.GPTQ, calibration=TEXT, **options)
    layers = [weight for name, weight in schemes(path).items() if name.startswith("model.layers")]
    assert {weight.bits for weight in layers} == {4}
    rounded = export_bundle(model, tmp_path / "r", bits=4, **options)  # to nearest, what was trained keeps 8
    assert {weight.bits for name, weight in schemes(rounded).items() if name.startswith("model.layers")} == {4, 8}


def test_four_tails_over_one_trunk(tiny_model_dir, tmp_path):
    """Every member's divergence is near that of the base alone, and the mix's is not above their mean."""
    model = tiny_model_dir("llama")
    tails = {f"t{seed}": make_tail(model, tmp_path / f"t{seed}", f"t{seed}", seed, 0.05) for seed in range(4)}
    held_out = HeldOut([TOKENS])
    path = export_bundle(model, tmp_path / "b", tails=tails, target=Target(bits=5.5), method=Method.GPTQ, calibration=TEXT,
                         held_out=held_out)  # fmt: skip
    alone = export_bundle(
        model, tmp_path / "a", target=Target(bits=5.5), method=Method.GPTQ, calibration=TEXT, held_out=held_out
    )
    limit = 2 * read_parity(alone).members[0].kl
    report = read_parity(path)
    assert len(report.members) == 4
    assert all(member.kl < limit for member in report.members)
    base = BaseModel(model)
    own = [Decoder.from_weights(base.config, dict(base.weights) | tail_weights(path)) for path in tails.values()]
    with torch.no_grad():
        exact = np.mean([decoder(torch.tensor([TOKENS]))[0].numpy() for decoder in own], axis=0)
    served = np.mean([score(path, "cpu", member) for member in range(4)], axis=0)
    assert kl(served, exact) <= np.mean([member.kl for member in report.members]) * 1.05


def tail_weights(path):
    from safetensors.torch import load_file

    return load_file(path / "tail.safetensors")


def test_statistics_are_gathered_once(tiny_model_dir, tmp_path, monkeypatch):
    text = Calibration(CHUNKS, tmp_path / "cache")
    options = {"bits": 4, "method": Method.SEARCH, "graphs": False}
    first = export_bundle(tiny_model_dir("llama"), tmp_path / "a", calibration=text, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(calibration_module, "gather", None)
    second = export_bundle(tiny_model_dir("llama"), tmp_path / "b", calibration=text, **options)
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    with pytest.raises(TypeError):  # other text: they would have to be gathered
        export_bundle(
            tiny_model_dir("llama"), tmp_path / "c", calibration=Calibration(CHUNKS[:2], text.cache), **options
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": Method.GPTQ, "bits": 8, "calibration": TEXT}, "method gptq chooses values of 4 bits"),
        ({"method": Method.GPTQ, "bits": 4}, "need calibration text, and there is none"),
        ({"target": Target(bits=5.0)}, "need calibration text, and there is none"),
        ({"target": Target(bits=5.0), "bits": 8, "calibration": TEXT}, "leave out bits and group_size"),
        ({"target": Target(bits=5.0), "group_size": 32, "calibration": TEXT}, "leave out bits and group_size"),
        ({"target": Target(bits=3.0), "calibration": TEXT}, "the smallest that these weights can be is .* bytes"),
        ({"target": Target(megabytes=0.01), "calibration": TEXT}, "the smallest that these weights can be is .* bytes"),
        ({"target": Target(kl=1e-12), "calibration": TEXT}, "the least KL .* and the target is 1e-12"),
        (
            {"method": Method.GPTQ, "bits": 4, "calibration": Calibration([[1, 2, 3]])},
            "at least 256 tokens, this one has 3",
        ),
        ({"bits": 4, "calibration": TEXT}, "4 bits with method round use no calibration text"),
        (
            {"target": Target(megabytes=0.3), "calibration": TEXT, "tails": {"a": None, "b": None}},
            "counts the base alone",
        ),
        ({"bits": 3}, "bits must be 4, 8 or 32, got 3"),
    ],
)
def test_what_cannot_be_done(tiny_model_dir, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export_bundle(tiny_model_dir("llama"), tmp_path / "b", graphs=False, **options)
    assert not (tmp_path / "b").exists()
    assert [path.name for path in tmp_path.iterdir()] == []


def test_sizes_that_no_group_divides(tiny_model_dir, tmp_path):
    values = json.loads((tiny_model_dir("llama") / "config.json").read_text()) | {"intermediate_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ConfigError, match=r"down_proj.weight: group_size 32 does not divide its 100 columns; none fits"
    ):
        export_bundle(tmp_path, tmp_path / "b", target=Target(bits=5.0), calibration=TEXT)


@pytest.mark.parametrize("size", [0, 100, 300_000])
def test_a_torn_cache_is_made_again(tiny_model_dir, tmp_path, size):
    text, options = Calibration(CHUNKS, tmp_path / "cache"), {"bits": 4, "method": Method.SEARCH, "graphs": False}
    first = export_bundle(tiny_model_dir("llama"), tmp_path / "a", calibration=text, **options)
    (cached,) = (tmp_path / "cache").iterdir()
    assert cached.stat().st_size > size
    cached.write_bytes(cached.read_bytes()[:size])
    second = export_bundle(tiny_model_dir("llama"), tmp_path / "b", calibration=text, **options)
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


def test_average_bits_are_those_of_a_small_embedding_too(tiny_model_dir, tmp_path):
    """Its scales need 32 bits, and the plan knows."""
    config, weights = read_config(tiny_model_dir("llama-untied")), read_weights(tiny_model_dir("llama-untied"))
    weights[EMBEDDING] = weights[EMBEDDING] * 1e-4
    text = ExitStack()
    with text:
        quantiser = QuantisationConfig(method=Method.SEARCH, target=Target(bits=5.0)).quantiser(
            config, weights, "x", TEXT, text
        )
        found = quantiser(EMBEDDING, weights[EMBEDDING].numpy())
    assert found.scales.dtype == np.float32
    others = {name: quantiser.plan[name] for name in quantiser.plan if name != EMBEDDING}
    layout = decoder_layout(config)
    columns = {f"{one.name}.weight": (one.rows, one.columns) for one in layout.linears}
    columns |= {layout.head: (config.vocab_size, config.hidden_size)}
    bits = sum(
        r * c * (s.bits + (16 if s.bits == 8 else 32) / s.group_size)
        for n, s in others.items()
        for r, c in [columns[n]]
    )
    count = sum(r * c for r, c in columns.values()) + weights[EMBEDDING].numel()
    assert (8 * found.num_bytes + bits) / count <= 5.0


@pytest.mark.parametrize("family", EXPERTS)
def test_experts(tiny_model_dir, tmp_path, family):
    """What their rounding is expected to cost is of the size of what it costs; those that no token runs are rounded as well."""
    path = export_bundle(tiny_model_dir(family), tmp_path / "b", target=Target(bits=6.0), method=Method.SEARCH, calibration=TEXT,
                         graphs=False)  # fmt: skip
    expected = Bundle.load(path).quantisation["expected_kl"]
    assert all(value > 0 for value in expected.values())
    found = kl(score(path, "cpu"), page(tiny_model_dir(family)))
    assert 0.02 * found < sum(expected.values()) < 3 * found
