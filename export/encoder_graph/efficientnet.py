"""The encoder of images of EfficientNet-Lite0: pixels [tiles, 3, edge, edge] → rows [tiles, rows of a tile, hidden size of
the text model]."""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto

from ...runtime.checkpoints.encoders.efficientnet import EfficientNetPage
from ...runtime.checkpoints.encoders.page import EncoderPage
from ...runtime.model.encoders.efficientnet import LEVELS, Convolution, EfficientNetConfig, blocks
from .writer import OPSET, EncoderWriter


class EfficientNetWriter(EncoderWriter):
    def __init__(self, page: EncoderPage, data: Path) -> None:
        super().__init__(page, data)
        assert isinstance(page, EfficientNetPage)
        assert isinstance(page.encoder.vision, EfficientNetConfig)
        self._encoder, self._pool, self._vision = page.encoder, page.pool, page.encoder.vision

    def write(self, path: Path) -> None:
        encoder, edge = self._encoder, self._encoder.processor.tile_size
        x = self._input("pixels", TensorProto.FLOAT, ["tiles", 3, edge, edge])
        found, taken = [], {name: (side, mean) for name, _, side, mean in LEVELS}
        for block in blocks(self._vision.levels):
            before = x
            for one in block.convolutions:
                x = self._convolution(x, one)
            x = self._node("Add", [x, before]) if block.is_residual else x
            if self._vision.levels == "all" and block.name in taken:
                side, mean = taken[block.name]
                level = self._node("AveragePool", [x], kernel_shape=[mean] * 2, strides=[mean] * 2)
                found.append(self._node("SpaceToDepth", [level], blocksize=side // mean))
        x = self._node("Concat", found, axis=1) if found else x
        if self._pool > 1:
            x = self._node("AveragePool", [x], kernel_shape=[self._pool] * 2, strides=[self._pool] * 2)
        x = self._node("Transpose", [self._reshaped(x, 0, self._vision.width, encoder.places)], perm=[0, 2, 1])
        rows = self._projected(x, encoder)
        self._output(rows, "rows", TensorProto.FLOAT, ["tiles", encoder.rows_per_tile, encoder.output_size])
        self._save(path, OPSET, microsoft=True)

    def _convolution(self, x: str, one: Convolution) -> str:
        before, after = one.padding
        x = self._node(
            "Conv",
            [x, self._stored(f"tower.{one.name}.weight"), self._stored(f"tower.{one.name}.bias")],
            strides=[one.stride] * 2,
            pads=[before, before, after, after],
            group=one.groups,
        )
        return self._node("Clip", [x, self._real(0.0), self._real(6.0)]) if one.is_activated else x
