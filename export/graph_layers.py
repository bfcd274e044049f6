"""`DecoderWriter`: how a decoder's layers are put together, whatever operators compute them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from ..runtime.model.config import DecoderConfig
from ..runtime.model.layout import Layer, Linear, Norm, decoder_layout
from ..runtime.model.stored import StoredTensor, StoredWeight, own_name
from .graph_nodes import NodeWriter, Place


class DecoderWriter(NodeWriter, ABC):
    """Writes the layers of one decoder with the weights of `member`; None: of the base."""

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, StoredTensor],
        place: Callable[[StoredTensor], Place],
        member: str | None = None,
    ) -> None:
        super().__init__(tensors, place, member)
        self.config = config
        self.layout = decoder_layout(config)

    @abstractmethod
    def _norm(self, norm: Norm, hidden: str, pending: str | None, *, residual: bool = True) -> tuple[str, str]:
        """Returns (normed, residual stream). A pending branch is added first: residual = hidden + pending."""

    @abstractmethod
    def _attention(self, index: int, layer: Layer, normed: str) -> str:
        """normed [B, S, hidden] → [B, S, hidden], and the layer's keys and values."""

    @abstractmethod
    def _mlp(self, layer: Layer, normed: str) -> str:
        """normed [B, S, hidden] → [B, S, hidden]."""

    @abstractmethod
    def _matmul(self, weight: StoredWeight, hidden: str) -> str:
        """hidden [..., columns] → [..., rows]."""

    @abstractmethod
    def _low_rank(self, halves: list[str], hidden: str) -> str:
        """hidden [..., columns] → B (A hidden), [..., rows], of the stored tensors A [rank, columns] and B [rows, rank]."""

    def _layer(self, index: int, layer: Layer, hidden: str, pending: str | None) -> tuple[str, str]:
        """Returns (residual stream, the branch that is not added to it yet)."""
        normed, hidden = self._input_of(layer.attention_norm, hidden, pending)
        attention = self._branch(layer.attention_out_norm, self._attention(index, layer, normed))
        normed, hidden = self._input_of(layer.mlp_norm, hidden, None if layer.parallel else attention)
        added = self._branch(layer.mlp_out_norm, self._mlp(layer, normed))
        return hidden, self._node("Add", [attention, added]) if layer.parallel else added

    def _input_of(self, norm: Norm | None, hidden: str, pending: str | None) -> tuple[str, str]:
        """Returns (what attention or an MLP gets, the residual stream)."""
        if norm is not None:
            return self._norm(norm, hidden, pending)
        total = hidden if pending is None else self._node("Add", [hidden, pending])
        return total, total

    def _branch(self, norm: Norm | None, added: str) -> str:
        """What is added to the residual stream."""
        normed = added if norm is None else self._norm(norm, added, None)[0]
        return self._scaled(normed, self.config.residual_scale)

    def _linear(self, linear: Linear, hidden: str) -> str:
        """hidden [B, S, columns] → [B, S, rows], with the member's low-rank update if it has one."""
        output = self._matmul(self._find_weight(f"{linear.name}.weight"), hidden)
        if linear.bias:
            output = self._node("Add", [output, self._tensor(f"{linear.name}.bias")])
        halves = (
            [own_name(self.member, f"{linear.name}.{half}") for half in ("lora_a", "lora_b")] if self.member else []
        )
        if not halves or halves[0] not in self.tensors:
            return output
        return self._node("Add", [output, self._low_rank(halves, hidden)])
