"""`EncoderWriter`: what the graphs of encoders share."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...runtime.checkpoints.encoders.page import EncoderPage
from ...runtime.model.encoders import Encoder
from ...runtime.model.encoders.image import RESAMPLER_HEADS, ImageEncoder
from ...runtime.model.stored import stored_tensors
from ..graph_nodes import MICROSOFT, NodeWriter, in_file

OPSET = 21
_EPSILON = 1e-5  # of torch's norms


class EncoderWriter(NodeWriter):
    """Writes the graph of one encoder. `data`: the file of its weights, which lies beside the graph."""

    def __init__(self, page: EncoderPage, data: Path) -> None:
        super().__init__(stored_tensors(data), in_file(data.name), None)

    @staticmethod
    def weights(page: EncoderPage) -> dict[str, Tensor]:
        """The tensors that the graph has, by name."""
        return dict(page.state_dict())

    def write(self, path: Path) -> None:
        raise NotImplementedError

    def _norm(self, x: str, name: str, epsilon: float) -> str:
        parts = [x, self._stored(f"{name}.weight"), self._stored(f"{name}.bias")]
        return self._node("LayerNormalization", parts, epsilon=epsilon)

    def _linear(self, x: str, name: str) -> str:
        """With a bias if there is one."""
        product = self._node("FusedMatMul", [x, self._stored(f"{name}.weight")], domain=MICROSOFT, transB=1)
        bias = f"{name}.bias"
        return self._node("Add", [product, self._stored(bias)]) if bias in self.tensors else product

    def _resampled(self, x: str, encoder: ImageEncoder) -> str:
        """See `Resampler`."""
        x = self._node("Add", [self._linear(x, "projector.input"), self._stored("projector.positions")])
        y = self._norm(x, "projector.norms.0", _EPSILON)
        x = self._node("Add", [x, self._attended(y, y, "projector.attention", RESAMPLER_HEADS)])
        inner = self._node("Gelu", [self._linear(self._norm(x, "projector.norms.1", _EPSILON), "projector.fc1")])
        x = self._node("Add", [x, self._linear(inner, "projector.fc2")])
        tiles = self._node("Shape", [x], start=0, end=1)
        size = self._ints(encoder.queries or 0, encoder.projector_size or 0)
        shape = self._node("Concat", [tiles, size], axis=0)
        queries = self._node("Expand", [self._stored("projector.queries"), shape])
        places = self._norm(x, "projector.norms.2", _EPSILON)
        queries = self._node("Add", [queries, self._attended(queries, places, "projector.cross", RESAMPLER_HEADS)])
        inner = self._linear(self._norm(queries, "projector.norms.3", _EPSILON), "projector.inner")
        return self._linear(self._node("Gelu", [inner]), "projector.output")

    def _attended(self, x: str, y: str, name: str, heads: int) -> str:
        """See `page.Attention`."""
        q, k, v = (self._linear(part, f"{name}.{kind}_proj") for part, kind in ((x, "q"), (y, "k"), (y, "v")))
        attended = self._node("MultiHeadAttention", [q, k, v], domain=MICROSOFT, num_heads=heads)
        return self._linear(attended, f"{name}.out_proj")

    def _projected(self, x: str, encoder: Encoder) -> str:
        if isinstance(encoder, ImageEncoder) and encoder.projector == "resampler":
            return self._resampled(x, encoder)
        if encoder.projector == "linear":
            return self._linear(x, "projector")
        return self._linear(self._node("Gelu", [self._linear(x, "projector.0")]), "projector.2")
