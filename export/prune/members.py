"""The members of an ensemble whose trunk is pruned: what is left of each, bound to the pruned model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...runtime.checkpoints.huggingface import checkpoint_digest
from ...runtime.checkpoints.members.adapter import is_separable, write_adapter
from ...runtime.checkpoints.members.files import check_base, first_layer
from ...runtime.checkpoints.members.registry import format_of
from ...runtime.checkpoints.members.tail import write_tail
from ...runtime.errors import ConfigError, UnsupportedModelError
from ...runtime.model.config import DecoderConfig
from ...runtime.model.members import MemberKind
from .cut import Cut

_WRITTEN = ("format", "kind", "sha256", "peft", "base")  # of a manifest, made anew when a member is written
_CARD = "README.md"


@dataclass(frozen=True, slots=True)
class PrunedMember:
    """A member as it was read. `tensors`: under canonical names of the original."""

    name: str
    path: Path
    kind: MemberKind
    manifest: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def own_layers(self, config: DecoderConfig) -> range:
        """The layers that the member has of its own."""
        if not self.kind.own_layers:
            return range(0)
        return range(first_layer(self.tensors, config.num_layers), config.num_layers)

    def check(self, cut: Cut) -> None:
        """Raises `UnsupportedModelError` for heads or widths that the member's own layers would not share."""
        if self.kind.own_layers and (cut.kv_heads or cut.channels):
            raise UnsupportedModelError(
                f"the tail '{self.name}' has layers of its own, of the model's heads and width, and config.json has one size "
                "for all layers; prune whole layers or the vocabulary, or leave the tail out"
            )

    def write(self, out: Path, config: DecoderConfig, cut: Cut, base: Mapping[str, Any]) -> None:
        """Write what is left of it. `config`: of the original. Raises `ConfigError` if nothing is left."""
        kept: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            new = cut.renamed(name)
            if new is not None:
                kept[new] = self._sliced(name, tensor, config, cut)
        if not any(".layers." in name for name in kept):
            raise ConfigError(
                f"all layers of the {self.kind} '{self.name}' would be removed; remove fewer, or leave it out"
            )
        manifest = {key: value for key, value in self.manifest.items() if key not in _WRITTEN}
        manifest |= {"base": dict(base), "pruned_from": self.manifest["base"]}
        card = self.path / _CARD
        files = {_CARD: card.read_text(encoding="utf-8")} if card.is_file() else {}
        if self.kind is MemberKind.ADAPTER:
            write_adapter(out, cut.config(config), kept, manifest, files=files)
        else:
            split = sum(layer < self.manifest["split_layer"] for layer in cut.layers)
            write_tail(out, {**manifest, "split_layer": split}, kept, files)

    def _sliced(self, name: str, tensor: Tensor, config: DecoderConfig, cut: Cut) -> Tensor:
        module, _, kind = name.rpartition(".")
        if kind not in ("lora_a", "lora_b"):
            return cut.sliced(name, tensor, config)
        places = cut.columns(module, config) if kind == "lora_a" else cut.rows(module, config)
        if places is None:
            return tensor
        return tensor[:, places] if kind == "lora_a" else tensor[places]


def read_members(
    model_dir: Path, config: DecoderConfig, tails: Mapping[str, Path], loras: Mapping[str, Path]
) -> list[PrunedMember]:
    """The members, read. Raises what reading them raises, `BundleError` for a member of another base, `ConfigError` for one that
    is of another kind or two of one name, `UnsupportedModelError` for an adapter that cannot be kept beside the base."""
    found: list[PrunedMember] = []
    digest = checkpoint_digest(model_dir) if tails or loras else ""
    for kind, paths in ((MemberKind.TAIL, tails), (MemberKind.ADAPTER, loras)):
        for name, path in paths.items():
            if Path(name).name != name or name.startswith("."):
                raise ConfigError(f"a member's name is a folder's here; '{name}' cannot be one")
            if any(member.name == name for member in found):
                raise ConfigError(f"two members are called '{name}'; give each a name of its own")
            manifest, tensors = format_of(path, kind).read(path, config)
            check_base(path, manifest, digest)
            if kind is MemberKind.ADAPTER and not is_separable(tensors):
                raise UnsupportedModelError(
                    f"the adapter '{name}' has more than pairs A, B of the layers' projections (DoRA, biases, or whole modules); "
                    "merge it into the model first"
                )
            found.append(PrunedMember(name, path, kind, manifest, tensors))
    return found
