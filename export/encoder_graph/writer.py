"""`EncoderWriter`: what the graphs of encoders share."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...runtime.checkpoints.encoders.page import EncoderPage
from ...runtime.model.encoders import Encoder
from ...runtime.model.stored import stored_tensors
from ..graph_nodes import MICROSOFT, NodeWriter, in_file

OPSET = 21


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

    def _projected(self, x: str, encoder: Encoder) -> str:
        if encoder.projector == "linear":
            return self._linear(x, "projector")
        return self._linear(self._node("Gelu", [self._linear(x, "projector.0")]), "projector.2")
