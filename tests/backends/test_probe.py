"""The probe: a backend that computes something else than the exported model is refused before it serves."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.models import make_tail
from motet.export.bundle_writer import export_bundle
from motet.export.parity import HeldOut
from motet.kernels.native import library
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.base import Backend
from motet.runtime.backends.onnx.backend import OnnxBackend
from motet.runtime.backends.open import open_backend
from motet.runtime.backends.probe import check_probe, read_probe
from motet.runtime.engine.open import open_engine
from motet.runtime.errors import BundleError, UnavailableError
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.files import file_digest
from motet.runtime.model.stored import stored_tensors
from motet.runtime.serve.settings import Settings

CHUNKS = [np.random.default_rng(3).integers(0, 256, 40).tolist()]
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not library.is_available(), reason="the kernels were not built")),
    "onnx",
    "torch",
]


@pytest.fixture(scope="module")
def exported(tiny_model_dir, tmp_path_factory):
    """A bundle with a base and a tail that differs, and one without a probe."""
    root, model_dir = tmp_path_factory.mktemp("probe"), tiny_model_dir("llama")
    tails = {"base": None, "tail": make_tail(model_dir, root / "tail", "tail", 1, 1.0)}
    text = HeldOut(CHUNKS, EngineConfig(threads=2))
    export_bundle(model_dir, root / "bare", tails=tails)
    return export_bundle(model_dir, root / "bundle", tails=tails, held_out=text)


def config(backend: str, **changes) -> EngineConfig:
    return EngineConfig(backend=backend, threads=2, max_num_seqs=1, **{"max_model_len": 64, **changes})


def copied(source, out, change):
    """A bundle whose files `change` has changed, under digests that agree."""
    out.mkdir()
    for file in source.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    change(out)
    manifest = json.loads((out / "motet.json").read_text())
    manifest["files"] = {name: file_digest(out / name) for name in manifest["files"]}
    (out / "motet.json").write_text(json.dumps(manifest))
    return Bundle.load(out)


def swap_columns(name):
    """The groups of a weight's rows in another order."""

    def change(out):
        tensor = stored_tensors(out / "model.safetensors")[name]
        with (out / "model.safetensors").open("r+b") as file:
            file.seek(tensor.offset)
            values = np.frombuffer(file.read(tensor.length), np.uint8).reshape(tensor.shape)
            file.seek(tensor.offset)
            file.write(np.ascontiguousarray(values[:, ::-1, ::-1]).tobytes())

    return change


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_answers_the_probe(exported, backend):
    bundle = Bundle.load(exported)
    probe = read_probe(bundle)
    assert list(probe.token_ids) == CHUNKS[0][:24]
    opened = open_backend(bundle, config(backend))
    for index, name in enumerate(bundle.members):
        member = probe.members[name]
        assert len(member.best) == 24 and len(member.best[0]) == 16
        assert 0 <= member.kl(opened.score(probe.token_ids, index)) < 0.01  # the model, rounded
        assert member.kl(opened.score(probe.token_ids, 1 - index)) > 10 * member.max_kl  # the other member
    opened.close()
    open_backend(bundle, config(backend, max_model_len=8)).close()  # fewer positions than the probe has tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_computation_is_refused(exported, tmp_path, backend):
    wrong = copied(exported, tmp_path / "b", swap_columns("model.layers.0.mlp.down_proj.weight.values"))
    said = rf"the {backend} backend does not compute 'bundle' here: member base .*--no-probe"
    with pytest.raises(UnavailableError, match=said):
        open_backend(wrong, config(backend))
    open_backend(wrong, config(backend, probe=False)).close()


def test_each_member_is_asked(exported, tmp_path):
    name = next(
        n for n in stored_tensors(exported / "model.safetensors") if n.startswith("members.tail.") and "down" in n
    )
    wrong = copied(exported, tmp_path / "b", swap_columns(name))
    with pytest.raises(UnavailableError, match="member tail differs from the model by a KL of"):
        open_backend(wrong, config("onnx"))


def test_what_is_no_number_is_refused(exported):
    class Broken:
        name = "broken"

        def score(self, token_ids, _member):
            return np.full((len(token_ids), 320), np.nan, np.float32)

    broken: Backend = Broken()
    with pytest.raises(UnavailableError, match="KL of inf"):
        check_probe(Bundle.load(exported), broken, 64)


def test_engines_ask(exported, tmp_path):
    """What opens a bundle for a server, and its setting."""
    wrong = copied(exported, tmp_path / "b", swap_columns("model.layers.0.mlp.down_proj.weight.values"))
    with pytest.raises(UnavailableError, match="member base differs"):
        open_engine(wrong.path, config("onnx"))
    settings = Settings.load(environment={"MOTET_SERVE_PROBE": "false"}).engine
    assert not settings.probe
    with open_engine(wrong.path, replace(settings, threads=2, backend="onnx")):
        pass


def test_logits_that_are_no_numbers_are_not_exported(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(OnnxBackend, "score", lambda _self, ids, _member: np.full((len(ids), 320), np.inf, np.float32))
    text = HeldOut(CHUNKS, EngineConfig(backend="onnx", threads=2))
    with pytest.raises(UnavailableError, match="the onnx backend gives logits of member base that are no numbers"):
        export_bundle(tiny_model_dir("llama"), tmp_path / "b", held_out=text)
    assert not (tmp_path / "b").exists()


def test_a_bundle_that_was_not_measured_has_none(exported):
    bundle = Bundle.load(exported.parent / "bare")
    assert read_probe(bundle) is None
    open_backend(bundle, config("onnx")).close()


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {},
        lambda p: p | {"token_ids": []},
        lambda p: p | {"token_ids": p["token_ids"] * 2},
        lambda p: p | {"token_ids": [30000] + p["token_ids"][1:]},
        lambda p: p | {"token_ids": [0.5] + p["token_ids"][1:]},
        lambda p: p | {"token_ids": [[token] for token in p["token_ids"]]},
        lambda p: p | {"token_ids": [True] + p["token_ids"][1:]},
        lambda p: p | {"members": []},
        lambda p: p | {"members": None},
        lambda p: p | {"members": {"base": p["members"]["base"]}},
        lambda p: p | {"members": p["members"] | {"tail": p["members"]["tail"] | {"max_kl": 10**400}}},
        lambda p: p | {"members": p["members"] | {"tail": p["members"]["tail"] | {"max_kl": "0.5"}}},
        lambda p: (
            p | {"members": p["members"] | {"tail": p["members"]["tail"] | {"logprobs": [[-(10**400)] * 16] * 24}}}
        ),
        lambda p: p | {"members": p["members"] | {"tail": p["members"]["tail"] | {"best": [[1] * 17] * 24}}},
        lambda p: p | {"more": " " * (1 << 24)},
        lambda p: p | {"members": p["members"] | {"tail": p["members"]["tail"] | {"max_kl": -1}}},
        lambda p: p | {"members": p["members"] | {"tail": p["members"]["tail"] | {"max_kl": "x"}}},
        lambda p: p | {"members": p["members"] | {"tail": p["members"]["tail"] | {"more": 1}}},
        lambda p: p | {"members": p["members"] | {"tail": p["members"]["tail"] | {"best": [[30000] * 16] * 24}}},
        lambda p: p | {"members": p["members"] | {"tail": p["members"]["tail"] | {"best": [[1]] * 24}}},
        lambda p: p | {"members": p["members"] | {"tail": p["members"]["tail"] | {"logprobs": [[1.0] * 16] * 24}}},
        lambda p: [],
    ],
)
def test_a_damaged_probe(exported, tmp_path, change):
    def damage(out):
        (out / "probe.json").write_text(json.dumps(change(json.loads((out / "probe.json").read_text()))))

    with pytest.raises(BundleError, match=r"probe\.json.*export the bundle again"):
        read_probe(copied(exported, tmp_path / "b", damage))
