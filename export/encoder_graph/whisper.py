"""The encoder of sounds: mel [sounds, mel bins, 2 · frames + 1] → rows [sounds, rows, hidden size of the text model]."""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto

from ...runtime.checkpoints.encoders.page import EncoderPage
from ...runtime.checkpoints.encoders.whisper import WhisperPage
from .writer import OPSET, EncoderWriter


class WhisperWriter(EncoderWriter):
    def __init__(self, page: EncoderPage, data: Path) -> None:
        super().__init__(page, data)
        assert isinstance(page, WhisperPage)
        self._encoder = page.encoder

    def write(self, path: Path) -> None:
        encoder, tower, pool = self._encoder, self._encoder.tower, self._encoder.pool
        mel = self._input("mel", TensorProto.FLOAT, ["sounds", tower.mel_bins, "columns"])
        x = self._convolution(self._convolution(mel, "conv1", 1), "conv2", 2)
        x = self._node("Slice", [x, self._ints(0), self._ints(-1), self._ints(2)])  # it sees what is behind the frames
        x = self._node("Transpose", [x], perm=[0, 2, 1])
        frames = self._node("Shape", [x], start=1, end=2)
        positions = self._stored("tower.embed_positions.weight")
        x = self._node("Add", [x, self._node("Slice", [positions, self._ints(0), frames, self._ints(0)])])
        for index in range(tower.num_layers):
            x = self._layer(x, f"tower.layers.{index}.")
        whole = self._node("Mul", [self._node("Div", [frames, self._ints(pool)]), self._ints(pool)])
        x = self._node("Slice", [x, self._ints(0), whole, self._ints(1)])
        if encoder.pooling == "average":
            x = self._reshaped(x, 0, -1, pool, tower.hidden_size)
            x = self._norm(self._node("ReduceMean", [x, self._ints(2)], keepdims=0), "tower.layer_norm", tower.norm_eps)
        else:
            x = self._reshaped(self._norm(x, "tower.layer_norm", tower.norm_eps), 0, -1, encoder.width)
        self._output(self._projected(x, encoder), "rows", TensorProto.FLOAT, ["sounds", "rows", encoder.output_size])
        self._save(path, OPSET, microsoft=True)

    def _convolution(self, x: str, name: str, stride: int) -> str:
        parts = [x, self._stored(f"tower.{name}.weight"), self._stored(f"tower.{name}.bias")]
        return self._node("Gelu", [self._node("Conv", parts, strides=[stride], pads=[1, 1])])

    def _layer(self, x: str, name: str) -> str:
        tower = self._encoder.tower
        normed = self._norm(x, f"{name}self_attn_layer_norm", tower.norm_eps)
        x = self._node("Add", [x, self._attended(normed, normed, f"{name}self_attn", tower.num_heads)])
        inner = self._linear(self._norm(x, f"{name}final_layer_norm", tower.norm_eps), f"{name}fc1")
        return self._node("Add", [x, self._linear(self._node("Gelu", [inner]), f"{name}fc2")])
