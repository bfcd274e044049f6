"""The method `projector`: the projectors of encoders learn to make of images or sounds what a frozen model understands (Merullo
et al. 2023; Liu et al. 2023). Base and towers stay as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.checkpoints.decoder import Decoder
from ...runtime.checkpoints.encoders.page import EncoderPage
from ...runtime.checkpoints.model_copy import copy_model
from ...runtime.checkpoints.own_encoders import own_tensors, read_own, write_own
from ...runtime.model.config import DecoderConfig
from ...runtime.model.files import new_directory
from ...runtime.model.layout import EMBEDDING
from ..data.batches import Item, TrainBatch, embed
from ..params import TuneParams
from .methods import Base, Learner

RECORD = "projector.json"
WHAT = "a model whose projector `motet tune` trained"
_SAMPLE = 2**16  # rows that the scales are measured on, at most
_LEAST = 1e-5


class ScaledProjector(nn.Module):
    """A projector between fixed scales: its inputs have mean 0 and deviation 1 in each channel over the training data, and its
    outputs become as large as embeddings of tokens are. So one learning rate fits all towers and models. The scales are a part of
    its first and last weights when it is written."""

    mean: Tensor
    deviation: Tensor
    scale: Tensor

    def __init__(self, projector: nn.Module, features: Tensor, size: float, *, is_new: bool) -> None:
        """`projector` is copied; unless it `is_new` (random), it is what it computes with the scales that it begins with.
        `features`: of training data, [rows, width]. `size`: root mean square of the model's embeddings."""
        super().__init__()
        self.inner = copy.deepcopy(projector).requires_grad_(True)
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("deviation", features.std(0, unbiased=False).clamp(min=_LEAST))
        self.register_buffer("scale", torch.tensor(size))
        if not is_new:
            with torch.no_grad():
                first, last = _ends(self.inner)
                first.bias.add_(first.weight @ self.mean)
                first.weight.mul_(self.deviation)
                last.weight.div_(self.scale)
                last.bias.div_(self.scale)

    def forward(self, features: Tensor) -> Tensor:
        rows: Tensor = self.inner((features - self.mean) / self.deviation) * self.scale
        return rows

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The projector with the scales in its weights."""
        found = copy.deepcopy(self.inner).requires_grad_(False)
        first, last = _ends(found)
        first.weight.div_(self.deviation)
        first.bias.sub_(first.weight @ self.mean)
        last.weight.mul_(self.scale)
        last.bias.mul_(self.scale)
        return found


def _ends(projector: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    return linears[0], linears[-1]


class ProjectorLearner(Learner):
    """A frozen decoder, in bfloat16 if `params.precision` is, and projectors that are trained."""

    prefix = "projectors"

    def __init__(
        self,
        config: DecoderConfig,
        base: Base,
        params: TuneParams,
        pages: Mapping[str, EncoderPage],
        new: Sequence[str],
        train: Sequence[Item],
    ) -> None:
        """`pages`: those that are trained; `new`: which of them have a random projector. `train`: what the scales are of."""
        nn.Module.__init__(self)
        self.params, self.config, self.base = params, config, base
        self.split, self.adapts = 0, False
        dtype = torch.bfloat16 if params.precision == "bf16" else torch.float32
        self.decoder = Decoder.from_weights(config, {name: tensor.to(dtype) for name, tensor in base.items()})
        self.decoder.requires_grad_(False)
        size = float(base[EMBEDDING].square().mean().sqrt()) * config.embedding_scale
        self.projectors = nn.ModuleDict(
            {
                medium: ScaledProjector(page.projector, _sample(train, medium), size, is_new=medium in new)
                for medium, page in pages.items()
            }
        )
        self._origin = self.state()
        self._trunk = []

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.projectors.named_parameters() if parameter.requires_grad}

    def change(self) -> Tensor:
        total = torch.zeros((), device=self.device)
        for name, parameter in self.trained().items():
            total = total + (parameter - self._origin[name].to(parameter)).abs().sum()
        return total

    def folded(self) -> dict[str, nn.Module]:
        """The projectors by medium, scales included."""
        found = {}
        for medium, projector in self.projectors.items():
            assert isinstance(projector, ScaledProjector)
            found[medium] = projector.folded()
        return found

    def _inputs(self, batch: TrainBatch) -> Tensor:
        encoded = [item.encoded for item in batch.items]
        parts = [part for item in encoded for part in item.embedded]
        rows: dict[int, Tensor] = {}
        for medium, projector in self.projectors.items():
            own = [part for part in parts if part.medium == medium]
            if own:
                sizes = [len(part.features) for part in own]
                features = [part.features.to(self.device, torch.float32) for part in own]
                if len(set(sizes)) == 1:
                    found = projector(torch.stack(features)).unbind()
                else:  # of sounds: each row is made of its own features
                    found = projector(torch.cat(features)[None])[0].split(sizes)
                rows |= {id(part): one for part, one in zip(own, found, strict=True)}
        return embed(self.decoder, encoded, rows_of=lambda part: rows[id(part)] if id(part) in rows else part.rows())


def _sample(train: Sequence[Item], medium: str) -> Tensor:
    """[rows, width] float32: features of the training data, the first of them."""
    found, count = [], 0
    for part in (part for item in train for part in item.encoded.embedded if part.medium == medium):
        if count >= _SAMPLE:
            break
        found.append(part.features.float())
        count += len(part.features)
    return torch.cat(found)


def write_model(
    out: Path,
    base: Path,
    pages: Mapping[str, EncoderPage],
    projectors: Mapping[str, nn.Module],
    manifest: Mapping[str, Any],
    files: Mapping[str, str],
) -> None:
    """Write a model directory: the base's files, its encoders that were not trained, and `pages` with these projectors; with
    `files` (name → text). Raises `ConfigError` if `out` exists and is something else."""
    encoders = {
        medium: (one, own_tensors(base, medium)) for medium, one in read_own(base).items() if medium not in pages
    }
    for medium, page in pages.items():
        tower = {name: tensor for name, tensor in page.state_dict().items() if not name.startswith("projector.")}
        own = {f"projector.{name}": tensor for name, tensor in projectors[medium].state_dict().items()}
        encoders[medium] = (page.encoder, tower | own)
    with new_directory(out, RECORD, WHAT) as work:
        copy_model(base, work)
        write_own(work, encoders)
        (work / RECORD).write_text(json.dumps({"format": 1, **manifest}, indent=1) + "\n")
        for name, text in files.items():
            (work / name).write_text(text)
