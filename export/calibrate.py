"""Equalisation before 8-bit quantisation: outliers of the activations are moved into the weights, where they do no
harm.

Activations are quantised at run time per row and group, so a channel that is always large makes its whole group
coarse. Equalisation divides channel j of a linear layer's input by s_j and multiplies column j of the weight by it.
The division is folded into the module that makes the input (a norm's weight, the rows of the up projection). The
function is unchanged.

s_j = sqrt(rms_j), normalised to a geometric mean of 1 within the group, so that only the spread *inside* a group
changes. After SmoothQuant (Xiao et al. 2023), with the same migration strength, 0.5. Not used for 4 bits: weights
that lie on a 4-bit grid would leave it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.checkpoints.decoder import Decoder
from ..runtime.model.config import DecoderConfig
from ..runtime.model.layout import Layout, decoder_layout
from .quantise import layer_group

F32 = npt.NDArray[np.float32]


def channel_rms(
    config: DecoderConfig, weights: Mapping[str, torch.Tensor], chunks: Sequence[Sequence[int]]
) -> dict[str, F32]:
    """Name of a linear layer → root mean square [columns] of its input channels, over all tokens of `chunks`. Only
    layers with a `source`, and of experts only those that some token runs. `weights` are those of one layer at a time."""
    with torch.device("meta"):
        decoder = Decoder(config)
    layers = decoder_layout(config).layers
    sums: dict[str, torch.Tensor] = {}

    def observe(name: str, module: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].detach().double().square().reshape(-1, inputs[0].shape[-1]).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return decoder.get_submodule(module).register_forward_pre_hook(hook)

    @contextmanager
    def observed(index: int) -> Iterator[None]:
        linears = [linear for linear in layers[index].linears if linear.source is not None]
        handles = [observe(linear.name, linear.parts[0].name) for linear in linears]  # all parts have the same input
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    decoder.run_streamed(weights, chunks, observed)
    num_tokens = sum(len(chunk) for chunk in chunks)
    return {name: (total / num_tokens).sqrt().float().numpy() for name, total in sums.items()}


def equalise(
    layout: Layout, weights: Mapping[str, F32], rms: Mapping[str, F32], group_size: int | None
) -> dict[str, F32]:
    """Equalised weights, which compute the same function. All members of a bundle must use the same `rms` (see
    `channel_rms`). `group_size`: see `layer_group`.

    `weights` may hold an adapter's `<module>.lora_a` and `.lora_b`: A has the columns of the weight, B its rows.
    """
    result = dict(weights)
    for linear in layout.linears:
        if linear.source is None or linear.name not in rms:
            continue
        scales = _scales(rms[linear.name], group_size)
        for name in (f"{linear.source}.{kind}" for kind in ("weight", "bias", "lora_b")):
            if name in result:
                result[name] = result[name] / (scales if result[name].ndim == 1 else scales[:, None])
        for name in (f"{part.name}.{kind}" for part in linear.parts for kind in ("weight", "lora_a")):
            if name in result:
                result[name] = result[name] * scales
    return result


def _scales(rms: F32, group_size: int | None) -> F32:
    groups = rms.astype(np.float64).reshape(-1, layer_group(8, len(rms), group_size))
    logs = 0.5 * np.log(np.maximum(groups, 1e-5))
    return np.asarray(np.exp(logs - logs.mean(axis=1, keepdims=True)).reshape(-1), dtype=np.float32)
