"""The training methods: which part of the decoder is trained, and how the result is written.

tail    the last n layers and the final norm            → a tail
lora    low-rank adapters beside chosen projections     → an adapter (PEFT, Mangrulkar et al. 2022; Hu et al. 2021)
qlora   the same over a base in NF4                     → an adapter (bitsandbytes; Dettmers et al. 2023)
full    all layers and the final norm                   → a tail of all layers

The method projector trains none of them (see `projector`).

The embedding is not trained. The head is trained only with `TuneParams.head`: members of an ensemble share one head.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.checkpoints.decoder import Decoder
from ...runtime.checkpoints.members.adapter import merge, write_adapter
from ...runtime.checkpoints.members.tail import write_tail
from ...runtime.errors import ConfigError, MissingPackageError, UnavailableError
from ...runtime.model.config import DecoderConfig
from ...runtime.model.layout import decoder_layout
from ...runtime.model.members import MemberKind
from ..data.batches import Item, TrainBatch, embed, make_batch
from ..params import TuneParams
from .trunk_cache import run_trunk

Base = Mapping[str, Tensor]


class Learner(nn.Module):
    """A decoder with a part that is trained. `split`: the first layer that is trained or adapted."""

    prefix = "decoder"  # the module whose parameters `trained` names

    def __init__(self, config: DecoderConfig, base: Base, params: TuneParams) -> None:
        super().__init__()
        params.check_makes_member()
        self.params = params
        self.split = config.num_layers - params.num_layers(config.num_layers)
        self.adapts = params.kind is MemberKind.ADAPTER
        self.base = base
        self.config = config
        torch.manual_seed(params.seed)
        if params.head and config.tied_head:  # a trained head cannot share the embedding's weight
            config = dataclasses.replace(config, tied_head=False)
            base = {**base, "lm_head.weight": base["model.embed_tokens.weight"]}
        self.decoder = (
            _adapted(config, base, params, self.split) if self.adapts else _unfrozen(config, base, self.split)
        )
        if params.head:
            self.decoder.lm_head.weight = nn.Parameter(base["lm_head.weight"].clone())
        self._trunk: list[Decoder] = []  # in a list, so that it is not a submodule

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        if (
            self.params.method == "qlora"
        ):  # in evaluation mode bitsandbytes repacks weights on a CPU for inference, irreversibly
            for module in self.decoder.modules():
                if hasattr(module, "quant_state"):
                    module.training = True
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.decoder.named_parameters() if p.requires_grad}

    def trunk(self) -> Decoder:
        """The base in bfloat16, for the layers below the split. It is made on first use."""
        if not self._trunk:
            self._trunk.append(make_trunk(self.config, self.base).to(self.device))
        return self._trunk[0]

    @property
    def device(self) -> torch.device:
        return self.decoder.model.embed_tokens.weight.device

    def loss(self, batch: TrainBatch, smoothing: float = 0.0) -> Tensor:
        """Mean negative log-likelihood of the answers' tokens in nats. `smoothing`: share of label smoothing."""
        targets = batch.targets.to(self.device)
        states = self._states(batch)
        wanted = targets >= 0
        return F.cross_entropy(self.decoder.head(states[wanted]).float(), targets[wanted], label_smoothing=smoothing)

    def example_losses(self, batch: TrainBatch) -> Tensor:
        """[B] mean negative log-likelihood of each example's answer in nats. DP-SGD clips the gradient of each."""
        targets = batch.targets.to(self.device)
        losses = F.cross_entropy(
            self.decoder.head(self._states(batch)).float().transpose(1, 2), targets, ignore_index=-1, reduction="none"
        )
        return losses.sum(1) / (targets >= 0).sum(1)

    def states_of(self, item: Item) -> Tensor:
        """[targets, hidden]: the final states of one example at the positions that predict its answer."""
        return self._states(make_batch([item]))[0]

    def _states(self, batch: TrainBatch) -> Tensor:
        result: Tensor = self.decoder.norm(self._last(batch))
        return result

    def _last(self, batch: TrainBatch) -> Tensor:
        """[B, A, hidden]: what the last layer makes at the positions that predict the answers."""
        share = 0.0 if self.adapts else self.params.dropout  # an adapter has its own dropout

        def dropout(x: Tensor) -> Tensor:
            return F.dropout(x, share, self.training) if share else x

        hidden = self._inputs(batch)
        positions = batch.positions.to(hidden.device)
        stop = self.config.num_layers
        return self.decoder.run_layers(hidden, self.split, stop, positions=positions, dropout=dropout)

    def _inputs(self, batch: TrainBatch) -> Tensor:
        """[B, S, hidden] float32: the input of the first trained layer."""
        if self.split == 0:
            return embed(self.decoder, [item.encoded for item in batch.items])
        known = [item.hidden for item in batch.items if item.hidden is not None]
        if len(known) == len(batch.items):
            return nn.utils.rnn.pad_sequence(known, batch_first=True).to(self.device, torch.float32)
        return run_trunk(self.trunk(), [item.encoded for item in batch.items], self.split).float()

    def change(self) -> Tensor:
        """Sum of the absolute changes of the trained weights, for L1; of an adapter, of its weights themselves."""
        total = torch.zeros((), device=self.device)
        for name, parameter in self.trained().items():
            origin = None if self.adapts else self.base.get(name)
            total = total + (parameter if origin is None else parameter - origin.to(parameter)).abs().sum()
        return total

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained tensors."""
        return {name: p.detach().cpu().clone() for name, p in self.trained().items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained tensors to those of `state`."""
        for name, parameter in self.trained().items():
            parameter.copy_(state[name])

    def merged(self) -> dict[str, Tensor]:
        """The weights that training has changed, whole, in float32 under canonical names; an adapter is added to its weights."""
        changed = {name: tensor for name, tensor in self.state().items() if ".lora_" not in name}
        if not self.adapts:
            return changed
        scale = self.params.alpha / self.params.rank
        pairs = {name: t * scale if name.endswith(".lora_b") else t for name, t in _pairs(self.decoder).items()}
        return merge(self.base, pairs) | changed

    def write(self, out: Path, manifest: Mapping[str, Any], files: Mapping[str, str]) -> None:
        """Write the result as a tail or an adapter, with `files` (name → text) beside it. Raises `ConfigError` if
        `out` exists and is something else."""
        if self.adapts:
            scale = self.params.alpha / self.params.rank
            write_adapter(out, self.config, _pairs(self.decoder), manifest, scale=scale, files=files)
        else:
            write_tail(out, {**manifest, "split_layer": self.split}, self.state(), files)


def make_trunk(config: DecoderConfig, base: Base) -> Decoder:
    """The base in bfloat16. Runs with and without the cache use it, so that they train on the same numbers."""
    return Decoder.from_weights(config, {name: tensor.to(torch.bfloat16) for name, tensor in base.items()}).eval()


def _unfrozen(config: DecoderConfig, base: Base, split: int) -> Decoder:
    prefixes = (*(f"model.layers.{i}." for i in range(split, config.num_layers)), "model.norm.")
    weights = {n: t.clone() if n.startswith(prefixes) else t for n, t in base.items()}  # copies: trials share the base
    decoder = Decoder.from_weights(config, weights)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    return decoder


def check_targets(config: DecoderConfig, params: TuneParams) -> None:
    """Raises `ConfigError` if an adapter's targets are no projections of the model."""
    known = decoder_layout(config).targets
    if params.kind is MemberKind.ADAPTER and not (params.targets and set(params.targets) <= set(known)):
        raise ConfigError(f"targets must be some of {list(known)}, got {list(params.targets)}")


def _adapted(config: DecoderConfig, base: Base, params: TuneParams, split: int) -> Decoder:
    check_targets(config, params)
    layout = decoder_layout(config)
    decoder = Decoder.from_weights(config, base)
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    if params.method == "qlora":
        _to_nf4(decoder)
    parts = (part for layer in layout.layers[split:] for linear in layer.adaptable for part in linear.parts)
    names = [part.name for part in parts if part.short_name in params.targets]
    # PEFT loads bitsandbytes wherever it is installed, and that complains of kernels that are not used.
    with _without_bitsandbytes():
        from peft import LoraConfig, inject_adapter_in_model

        lora = LoraConfig(r=params.rank, lora_alpha=params.alpha, lora_dropout=params.dropout, target_modules=names)
        inject_adapter_in_model(lora, decoder)
    return decoder


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Let an import find no bitsandbytes here, unless it is loaded already, as for qlora."""
    hidden = "bitsandbytes" not in sys.modules
    if hidden:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["bitsandbytes"]


def _to_nf4(decoder: Decoder) -> None:
    """Quantise the layers' weights to 4-bit NormalFloat, in place. Raises `MissingPackageError` without bitsandbytes,
    `UnavailableError` if it does not support this machine."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels for inference that it does not find
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingPackageError(
            f"method qlora needs bitsandbytes ({error}); install it with `pip install 'motet[qlora]'`, or use lora"
        ) from error
    linears = decoder_layout(decoder.config).linears
    for name in [part.name for linear in linears for part in linear.parts]:
        module = decoder.get_submodule(name)
        assert isinstance(module, nn.Linear)
        linear = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None, quant_type="nf4"
        )
        linear.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        linear.bias = module.bias
        try:
            linear = linear.to(module.weight.device if module.weight.is_cuda else _device())  # quantises
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            raise UnavailableError(
                f"bitsandbytes has no NF4 for this machine ({error}); use method lora, or a GPU"
            ) from error
        parent, _, last = name.rpartition(".")
        setattr(decoder.get_submodule(parent), last, linear)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _pairs(decoder: Decoder) -> dict[str, Tensor]:
    """PEFT's trained tensors under canonical names."""
    tensors = {}
    for name, module in decoder.named_modules():
        if hasattr(module, "lora_A"):
            tensors[f"{name}.lora_a"] = module.lora_A["default"].weight.detach().float().cpu()
            tensors[f"{name}.lora_b"] = module.lora_B["default"].weight.detach().float().cpu()
    return tensors
