"""The encoder of images as an ONNX graph, with weights in a file of its own: pixels [tiles, 3, edge, edge] → rows [tiles, rows
of a tile, hidden size of the text model]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from ..runtime.api.config import EngineConfig
from ..runtime.backends.onnx.sessions import open_session, pool_threads
from ..runtime.checkpoints.vision import OLD_TEMPLATE, VisionEncoder, read_image_encoder
from ..runtime.checkpoints.weight_files import read_json
from ..runtime.errors import BundleError, UnsupportedModelError
from ..runtime.model.encoders import IMAGE
from ..runtime.model.encoders.vision import AROUND
from ..runtime.model.stored import stored_tensors
from ..runtime.text.tokenizer import Tokenizer
from .graph_nodes import MICROSOFT, NodeWriter
from .tensor_file import TensorFile

GRAPH, DATA = "encoder-vision.onnx", "encoder-vision.safetensors"
TOLERANCE = 1e-4  # of a row's values, as a part of the largest
_OPSET = 21
_POSITIONS = "embeddings.positions"  # of a tile's patches


def write_encoder(model_dir: Path, work: Path) -> dict[str, Any] | None:
    """Write the encoder of a model directory, if it has one; the manifest's `encoders`. The graph is run and compared with the
    encoder in torch. Raises what `VisionEncoder.from_dir` raises, and `BundleError` if they differ."""
    if read_image_encoder(model_dir) is None:
        return None
    _check_tokens(model_dir)
    page = VisionEncoder.from_dir(model_dir)
    with torch.no_grad():
        weights = {name: tensor for name, tensor in page.state_dict().items() if "position_embedding" not in name}
        weights[_POSITIONS] = page.positions()
    with TensorFile(work / DATA, weights, {}) as file:
        for name, tensor in weights.items():
            file.add(name, tensor.numpy())
    _Writer(page, work).write(work / GRAPH)
    _check(page, work / GRAPH)
    return {IMAGE: {"graph": GRAPH, "data": DATA, **page.encoder_config.to_dict()}}


def _check_tokens(model_dir: Path) -> None:
    """Raises `UnsupportedModelError` unless the placeholder is the tokenizer's, as the processor takes it to be."""
    encoder, tokenizer = read_image_encoder(model_dir), Tokenizer.from_dir(model_dir)
    assert encoder is not None
    found = tokenizer.token_id(encoder.token)
    if found != encoder.token_id or tokenizer.token_id(AROUND) is None:
        raise UnsupportedModelError(
            f"config.json has image_token_id {encoder.token_id}, and the tokenizer gives {encoder.token} the id {found} and "
            f"{AROUND} the id {tokenizer.token_id(AROUND)}; use the tokenizer that the model was trained with"
        )


def copy_old_template(model_dir: Path, work: Path) -> None:
    """Older processors have their chat template in a file of JSON, which goes before the tokenizer's. Raises `BundleError` if it
    holds none."""
    old, new = model_dir / OLD_TEMPLATE, work / "chat_template.jinja"
    if new.is_file() or not old.is_file():
        return
    template = read_json(old).get("chat_template")
    if not isinstance(template, str):
        raise BundleError(f"'{old}' has no chat_template, a text; pull the model again")
    new.write_text(template)


class _Writer(NodeWriter):
    def __init__(self, page: VisionEncoder, work: Path) -> None:
        super().__init__(stored_tensors(work / DATA), lambda tensor: (DATA, tensor.offset, tensor.length), None)
        self._encoder = page.encoder_config

    def write(self, path: Path) -> None:
        encoder, vision = self._encoder, self._encoder.vision
        edge, patches = encoder.processor.tile_size, encoder.side**2
        pixels = self._input("pixels", TensorProto.FLOAT, ["tiles", 3, edge, edge])
        name = "embeddings.patch_embedding"
        x = self._node(
            "Conv",
            [pixels, self._stored(f"{name}.weight"), self._stored(f"{name}.bias")],
            strides=[vision.patch_size] * 2,
        )
        x = self._node("Transpose", [self._reshaped(x, 0, vision.hidden_size, patches)], perm=[0, 2, 1])
        x = self._node("Add", [x, self._stored(_POSITIONS)])
        for index in range(vision.num_layers):
            x = self._layer(x, f"encoder.layers.{index}.")
        x = self._norm(x, "post_layernorm")
        side, shuffle = encoder.side // vision.shuffle, vision.shuffle
        x = self._reshaped(x, 0, side, shuffle, side, shuffle, vision.hidden_size)
        x = self._node("Transpose", [x], perm=[0, 1, 3, 2, 4, 5])
        x = self._reshaped(x, 0, encoder.rows_per_tile, vision.hidden_size * shuffle**2)
        rows = self._node("FusedMatMul", [x, self._stored("proj.weight")], domain=MICROSOFT, transB=1)
        self._output(rows, "rows", TensorProto.FLOAT, ["tiles", encoder.rows_per_tile, vision.output_size])
        self._save(path, _OPSET, microsoft=True)

    def _layer(self, x: str, name: str) -> str:
        vision = self._encoder.vision
        normed = self._norm(x, f"{name}layer_norm1")
        q, k, v = (self._linear(normed, f"{name}self_attn.{part}_proj") for part in "qkv")
        attended = self._node("MultiHeadAttention", [q, k, v], domain=MICROSOFT, num_heads=vision.num_heads)
        x = self._node("Add", [x, self._linear(attended, f"{name}self_attn.out_proj")])
        inner = self._linear(self._norm(x, f"{name}layer_norm2"), f"{name}mlp.fc1")
        inner = self._node("Gelu", [inner], approximate="tanh")
        return self._node("Add", [x, self._linear(inner, f"{name}mlp.fc2")])

    def _norm(self, x: str, name: str) -> str:
        parts = [x, self._stored(f"{name}.weight"), self._stored(f"{name}.bias")]
        return self._node("LayerNormalization", parts, epsilon=self._encoder.vision.norm_eps)

    def _linear(self, x: str, name: str) -> str:
        product = self._node("FusedMatMul", [x, self._stored(f"{name}.weight")], domain=MICROSOFT, transB=1)
        return self._node("Add", [product, self._stored(f"{name}.bias")])


def _check(page: VisionEncoder, graph: Path) -> None:
    """Compare the graph with the encoder in torch, on a tile of noise and one of one colour."""
    edge = page.encoder_config.processor.tile_size
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, edge, edge)).astype(np.float32)
    pixels[1] = pixels[1, :, :1, :1]
    session = open_session(str(graph), pool_threads() or EngineConfig().num_threads)
    found = session.run(None, {"pixels": pixels})[0]
    with torch.no_grad():
        expected = page(torch.from_numpy(pixels)).numpy()
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-9))
    if not error <= TOLERANCE:
        raise BundleError(
            f"ONNX Runtime computes other rows than the encoder has (apart by {error:.2g} of the largest, at most {TOLERANCE:g} "
            "is allowed); report this model"
        )
