"""The encoder of images: pixels [tiles, 3, edge, edge] → rows [tiles, rows of a tile, hidden size of the text model]."""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto
from torch import Tensor

from ...runtime.checkpoints.encoders.page import EncoderPage
from ...runtime.checkpoints.encoders.siglip import SiglipPage
from .writer import OPSET, EncoderWriter

_POSITIONS = "tower.embeddings.positions"  # of a tile's patches


class SiglipWriter(EncoderWriter):
    def __init__(self, page: EncoderPage, data: Path) -> None:
        super().__init__(page, data)
        assert isinstance(page, SiglipPage)
        self._encoder, self._vision = page.encoder, page.vision

    @staticmethod
    def weights(page: EncoderPage) -> dict[str, Tensor]:
        assert isinstance(page, SiglipPage)
        kept = {name: tensor for name, tensor in page.state_dict().items() if "position_embedding" not in name}
        return kept | {_POSITIONS: page.tower.positions()}

    def write(self, path: Path) -> None:
        encoder, vision = self._encoder, self._vision
        edge = encoder.processor.tile_size
        side = edge // vision.patch_size
        pixels = self._input("pixels", TensorProto.FLOAT, ["tiles", 3, edge, edge])
        name = "tower.embeddings.patch_embedding"
        x = self._node(
            "Conv",
            [pixels, self._stored(f"{name}.weight"), self._stored(f"{name}.bias")],
            strides=[vision.patch_size] * 2,
        )
        x = self._node("Transpose", [self._reshaped(x, 0, vision.hidden_size, side**2)], perm=[0, 2, 1])
        x = self._node("Add", [x, self._stored(_POSITIONS)])
        for index in range(vision.num_layers):
            x = self._layer(x, f"tower.encoder.layers.{index}.")
        x = self._norm(x, "tower.post_layernorm", vision.norm_eps)
        side, shuffle = side // vision.shuffle, vision.shuffle
        x = self._reshaped(x, 0, side, shuffle, side, shuffle, vision.hidden_size)
        x = self._node("Transpose", [x], perm=[0, 1, 3, 2, 4, 5])
        x = self._reshaped(x, 0, encoder.places, vision.width)
        rows = self._projected(x, encoder)
        self._output(rows, "rows", TensorProto.FLOAT, ["tiles", encoder.rows_per_tile, vision.output_size])
        self._save(path, OPSET, microsoft=True)

    def _layer(self, x: str, name: str) -> str:
        vision = self._vision
        normed = self._norm(x, f"{name}layer_norm1", vision.norm_eps)
        x = self._node("Add", [x, self._attended(normed, normed, f"{name}self_attn", vision.num_heads)])
        inner = self._linear(self._norm(x, f"{name}layer_norm2", vision.norm_eps), f"{name}mlp.fc1")
        inner = self._node("Gelu", [inner], approximate="tanh")
        return self._node("Add", [x, self._linear(inner, f"{name}mlp.fc2")])
