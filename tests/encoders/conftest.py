"""A model with an encoder of images, as transformers runs it, and its bundle; models that hear."""

from __future__ import annotations

import pytest
from helpers.media import CONFIG, write_image_model
from helpers.servers import serving, serving_http
from helpers.sounds import write_sound_model
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.client.client import Client
from motet.runtime.engine.engine import Engine


@pytest.fixture(scope="session")
def image_model_dir(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("image-model") / "tiny")


@pytest.fixture(scope="session")
def reference(image_model_dir):
    """(transformers' model, its processor)."""
    import transformers
    from helpers.media import reference_processor

    model = transformers.AutoModelForImageTextToText.from_pretrained(image_model_dir).eval()
    return model, reference_processor(image_model_dir)


@pytest.fixture(scope="module", params=["qwen2_audio", "voxtral"])
def family(request):
    """Of a model that hears."""
    return request.param


@pytest.fixture(scope="module")
def model_dir(family, tmp_path_factory):
    return write_sound_model(tmp_path_factory.mktemp(family) / "m", family)


@pytest.fixture(scope="module")
def model(model_dir, family):
    """The same in transformers."""
    import transformers

    kind = {"qwen2_audio": "Qwen2AudioForConditionalGeneration", "voxtral": "VoxtralForConditionalGeneration"}[family]
    return getattr(transformers, kind).from_pretrained(model_dir).eval()


@pytest.fixture(scope="session")
def image_bundle(image_model_dir, tmp_path_factory):
    return export_bundle(image_model_dir, tmp_path_factory.mktemp("images") / "tiny", bits=32)


@pytest.fixture(scope="session")
def image_engine(image_bundle):
    with Engine.from_bundle(image_bundle, EngineConfig(**CONFIG)) as engine:
        yield engine


@pytest.fixture(scope="session")
def client(image_engine):
    with serving(image_engine) as server, Client(server.address) as client:
        yield client


@pytest.fixture(scope="session")
def alone(image_bundle):
    """(host:port of an HTTP door, the engine): the doors' ends drain their engines, so it has its own."""
    with (
        Engine.from_bundle(image_bundle, EngineConfig(**CONFIG)) as engine,
        serving_http(engine) as (address, _service),
    ):
        yield address, engine
