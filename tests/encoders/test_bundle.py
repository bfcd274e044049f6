"""The encoder in a bundle: what export writes, what loading refuses, what other commands do with such a model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
import transformers
from helpers.media import write_image_model
from motet.export.bundle_writer import export_bundle
from motet.export.onnx_directory import write_onnx
from motet.export.prune.params import PruneParams
from motet.export.prune.prune import prune
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.onnx.sessions import open_session, pool_threads
from motet.runtime.checkpoints.encoders import encoder_pages, read_encoders
from motet.runtime.checkpoints.store import pull
from motet.runtime.engine.engine import Engine
from motet.runtime.engine.open import bundle_tokenizer
from motet.runtime.errors import BundleError, UnsupportedModelError
from motet.runtime.model.bundle import MANIFEST, Bundle
from motet.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def image_bundle(image_model_dir, tmp_path_factory):
    return export_bundle(image_model_dir, tmp_path_factory.mktemp("bundle") / "tiny", graphs=False)


def test_the_graph_computes_what_the_encoder_computes(image_model_dir, image_bundle):
    session = open_session(str(image_bundle / "encoder-image.onnx"), pool_threads() or 1)
    page = encoder_pages(image_model_dir)["image"]
    pixels = np.random.default_rng(4).uniform(-1, 1, (5, 3, 24, 24)).astype(np.float32)
    with torch.no_grad():
        expected = page(torch.from_numpy(pixels)).numpy()
    [rows] = session.run(None, {"pixels": pixels})
    assert np.abs(rows - expected).max() < 1e-4
    assert isinstance(session, ort.InferenceSession)


def test_what_the_manifest_says(image_bundle, image_model_dir):
    bundle = Bundle.load(image_bundle)
    assert bundle.encoders == read_encoders(image_model_dir)
    assert {"encoder-image.onnx", "encoder-image.safetensors"} <= {*bundle.model_files} & {*bundle.manifest["files"]}
    assert bundle.eos_token_ids == (261,)


def damaged(source, path, change):
    shutil.copytree(source, path)
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["encoders"].update(video={}), r"encoders of \['video'\]"),
        (lambda m: m["encoders"]["image"].update(speed=1), "unknown ImageEncoder key"),
        (lambda m: m["encoders"]["image"]["vision"].update(speed=1), "unknown VisionConfig key"),
        (lambda m: m["encoders"]["image"]["vision"].pop("shuffle"), "shuffle"),
        (lambda m: m["encoders"]["image"]["vision"].update(shuffle=5), "no multiple of 20"),
        (lambda m: m["encoders"]["image"]["processor"].update(tile_size=10**9), "tile_size must be"),
        (lambda m: m["encoders"]["image"]["processor"].update(longest_edge=None), "must have a longest_edge"),
        (lambda m: m["encoders"]["image"].pop("graph"), "graph"),
        (lambda m: m["encoders"]["image"].update(graph="../x.onnx"), "plain file names"),
        (lambda m: m["encoders"]["image"].update(data="x"), "must list the plain file names"),
        (lambda m: m["encoders"].update(image=3), "inconsistent"),
        (lambda m: m["encoders"]["image"].update(token_id=320), "has the id 320, the model 320 embeddings"),
        (lambda m: m.update(encoders=["image"]), "are an object, by medium; it has list"),
        (lambda m: m["encoders"]["image"]["vision"].update(norm_eps=10**400), "norm_eps"),
    ],
)
def test_a_changed_manifest_is_refused(image_bundle, tmp_path, change, message):
    with pytest.raises(BundleError, match=message):
        Bundle.load(damaged(image_bundle, tmp_path / "b", change), verify=False)


@pytest.mark.native
def test_a_graph_that_is_not_the_manifest_s_is_refused(image_bundle, tmp_path):
    """A graph of other sizes, one that is cut off, one whose weights are gone: each is a `BundleError` when it is opened."""
    changes = {
        "sizes": lambda m: m["encoders"]["image"]["processor"].update(tile_size=48),
        "width": lambda m: m["encoders"]["image"]["vision"].update(output_size=65),
    }
    for name, change in changes.items():
        path = damaged(image_bundle, tmp_path / name, change)
        with pytest.raises(BundleError, match="inputs and outputs of"):
            Engine.from_bundle(path, EngineConfig(threads=1), verify=False)
    for name, file in (("torn", "encoder-image.onnx"), ("empty", "encoder-image.safetensors")):
        path = damaged(image_bundle, tmp_path / name, lambda _m: None)
        content = (path / file).read_bytes()
        (path / file).write_bytes(content[: len(content) // 3])
        with pytest.raises(BundleError, match="damaged: its SHA-256"):
            Engine.from_bundle(path, EngineConfig(threads=1))
        with pytest.raises(BundleError, match="ONNX Runtime cannot load"):
            Engine.from_bundle(path, EngineConfig(threads=1), verify=False)


def test_a_placeholder_that_is_not_the_tokenizer_s_is_refused(tmp_path):
    path = write_image_model(tmp_path / "m")
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"image_token_id": 261}))
    with pytest.raises(UnsupportedModelError, match="image has the id 261, and its tokenizer gives <image> the id 260"):
        export_bundle(path, tmp_path / "b", graphs=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_id": 261}, "gives '<image>' the id 261, the tokenizer 260"),
        ({"token": "<end_of_utterance>"}, "the id 260, the tokenizer 261"),
        ({"token": "<picture>"}, "the tokenizer None"),
    ],
)
def test_a_bundle_whose_placeholder_is_not_the_tokenizer_s_is_refused(image_bundle, tmp_path, change, message):
    path = damaged(image_bundle, tmp_path / "b", lambda m: m["encoders"]["image"].update(change))
    with pytest.raises(BundleError, match=message):
        bundle_tokenizer(Bundle.load(path, verify=False))


@pytest.mark.parametrize("what", ["lora", "saved", "bias"])
def test_an_adapter_that_changes_the_encoder_is_refused(image_model_dir, tmp_path, what):
    """Members share the base's encoder. The adapter is PEFT's own."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(image_model_dir)
    changes = {
        "lora": {"target_modules": r".*(text_model.*q_proj|modality_projection\.proj)"},
        "saved": {"target_modules": r".*text_model.*q_proj", "modules_to_save": ["modality_projection"]},
        "bias": {"target_modules": r".*text_model.*q_proj", "bias": "all"},
    }
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **changes[what])).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedModelError, match=r"model\.(connector|vision_model)"):
        export_bundle(image_model_dir, tmp_path / "b", loras={"a": tmp_path / "a"}, graphs=False)


def test_an_older_processor_s_template_is_taken_over(tmp_path):
    """For training as for serving, before that of the tokenizer."""
    path = write_image_model(tmp_path / "m")
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").unlink()
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "of the tokenizer"}))
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    export_bundle(path, tmp_path / "b", graphs=False)
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == template
    asked = [{"role": "user", "content": "what?"}]
    trained, served = (Tokenizer.from_dir(folder).apply_chat_template(asked) for folder in (path, tmp_path / "b"))
    assert trained == served != "of the tokenizer"
    (path / "chat_template.json").write_text("{}")
    with pytest.raises(BundleError, match="has no chat_template, a text"):
        export_bundle(path, tmp_path / "c", graphs=False)


def test_a_pull_keeps_the_processor(image_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MOTET_HOME", str(tmp_path))
    pulled = pull(str(image_model_dir), name="eyes", show_progress=False)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (pulled / name).read_text() == (image_model_dir / name).read_text()


def test_the_onnx_directory_of_other_runtimes_is_of_text(image_bundle, tmp_path):
    with pytest.raises(UnsupportedModelError, match="has an encoder of image, which this directory cannot hold"):
        write_onnx(Bundle.load(image_bundle), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_only_models_of_text_are_pruned(image_model_dir, tmp_path):
    with pytest.raises(
        UnsupportedModelError, match="has an encoder beside its decoder, and only models of text are pruned"
    ):
        prune(image_model_dir, tmp_path / "p", PruneParams(layers=1), chunks=[[1, 2, 3]], calibration="own")
