"""The encoders of a model as ONNX graphs, each with weights in a file of its own. A tower is a file here, and a row in
`WRITERS`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...runtime.api.config import EngineConfig
from ...runtime.backends.onnx.sessions import open_session, pool_threads
from ...runtime.checkpoints.encoders import encoder_pages, read_encoders
from ...runtime.checkpoints.encoders.efficientnet import EfficientNetPage
from ...runtime.checkpoints.encoders.page import EncoderPage
from ...runtime.checkpoints.encoders.siglip import SiglipPage
from ...runtime.checkpoints.encoders.whisper import WhisperPage
from ...runtime.errors import BundleError, UnsupportedModelError
from ...runtime.model.encoders import Encoder
from ...runtime.text.tokenizer import Tokenizer
from ..tensor_file import TensorFile
from .efficientnet import EfficientNetWriter
from .siglip import SiglipWriter
from .whisper import WhisperWriter
from .writer import EncoderWriter

WRITERS: Mapping[type[EncoderPage], type[EncoderWriter]] = {
    SiglipPage: SiglipWriter,
    WhisperPage: WhisperWriter,
    EfficientNetPage: EfficientNetWriter,
}
TOLERANCE = 1e-4  # of a row's values, as a part of the largest


def write_encoders(model_dir: Path, work: Path) -> dict[str, Any]:
    """Write the encoders of a model directory; the manifest's `encoders`, empty if it has none. Each graph is run and compared
    with the encoder in torch. Raises what `encoder_pages` raises, and `BundleError` if they differ."""
    encoders = read_encoders(model_dir)
    if not encoders:
        return {}
    tokenizer = Tokenizer.from_dir(model_dir)
    for medium, encoder in encoders.items():
        _check_tokens(medium, encoder, tokenizer)
    return {medium: write_encoder(medium, page, work) for medium, page in encoder_pages(model_dir).items()}


def write_encoder(medium: str, page: EncoderPage, work: Path) -> dict[str, Any]:
    """Write one encoder; its entry in a manifest. Raises `BundleError` if its graph computes something else."""
    graph, data = f"encoder-{medium}.onnx", f"encoder-{medium}.safetensors"
    kind = WRITERS[type(page)]
    with torch.no_grad():
        weights = kind.weights(page)
    with TensorFile(work / data, weights, {}) as file:
        for name, tensor in weights.items():
            file.add(name, tensor.numpy())
    kind(page, work / data).write(work / graph)
    _check(medium, page, work / graph)
    return {"graph": graph, "data": data, **page.encoder.to_dict()}


def _check_tokens(medium: str, encoder: Encoder, tokenizer: Tokenizer) -> None:
    """Raises `UnsupportedModelError` unless the placeholder is the tokenizer's, as the processor takes it to be."""
    found = tokenizer.token_id(encoder.token)
    missing = [token for token in encoder.needed_tokens if tokenizer.token_id(token) is None]
    if found != encoder.token_id or missing:
        raise UnsupportedModelError(
            f"the model's placeholder of {medium} has the id {encoder.token_id}, and its tokenizer gives {encoder.token} the id "
            f"{found} and lacks {missing}; use the tokenizer that the model was trained with"
        )


def _check(medium: str, page: EncoderPage, graph: Path) -> None:
    """Compare the graph with the encoder in torch."""
    inputs = page.example()
    session = open_session(str(graph), pool_threads() or EngineConfig().num_threads)
    found = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]
    with torch.no_grad():
        expected = page(inputs).numpy()
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-9))
    if not error <= TOLERANCE:
        raise BundleError(
            f"ONNX Runtime computes other rows than the encoder of {medium} has (apart by {error:.2g} of the largest, at most "
            f"{TOLERANCE:g} is allowed); report this model"
        )
