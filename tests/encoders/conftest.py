"""A model with an encoder of images, as transformers runs it, and its bundle."""

from __future__ import annotations

import pytest
from helpers.media import write_image_model


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
