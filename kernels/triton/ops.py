"""The Triton kernels in one module, with the signatures of `kernels.oracle.eager`. Importing it imports Triton."""

from __future__ import annotations

from ..oracle.eager import dequantise
from .activate import activate
from .lora_adapter import add_adapter
from .mix_head_sample import mix_head_sample, mix_rows
from .mix_sample import mix_sample
from .paged_attention import decode_attention
from .prefill_attention import prefill_attention
from .residual_norm import residual_norm
from .rotary_write import rotary_write
from .weight_matmul import matmul

__all__ = [
    "activate",
    "add_adapter",
    "decode_attention",
    "dequantise",
    "matmul",
    "mix_head_sample",
    "mix_rows",
    "mix_sample",
    "prefill_attention",
    "residual_norm",
    "rotary_write",
]
