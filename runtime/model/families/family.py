"""`Family`: what Motet knows about one model family, and functions that the families' files share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UnsupportedModelError
from ..config import DecoderConfig

Json = Mapping[str, Any]

_BUFFERS = (".rotary_emb.inv_freq",)  # of any family; not weights


@dataclass(frozen=True, slots=True)
class Family:
    """How a family's checkpoints are read.

    `name`: config.json's `model_type`. `keys`: the keys of config.json that are read. `config` translates a parsed
    config.json and raises `UnsupportedModelError` for options that Motet cannot compute. `modules`: module names of the
    checkpoint → canonical ones, with `{}` for the layer's number; empty if they are canonical already. `prefix`: an
    optional prefix of the checkpoint's names. `transposed`: the layers' weights are stored as [in, out]. `norm_offset`: what
    is added to the stored weights of norms. `grouped_qkv`: a matrix of q, k and v has, for each head of keys, its
    queries, its key and its value. `buffers`: how the names of the family's own tensors end that are not weights.
    `encoders`: how the names of tensors begin that are not the decoder's, but an encoder's (`model.encoders`) → how they begin in
    the encoder's page.
    """

    name: str
    keys: frozenset[str]
    config: Callable[[Json], DecoderConfig]
    modules: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    transposed: bool = False
    norm_offset: float = 0.0
    grouped_qkv: bool = False
    buffers: tuple[str, ...] = ()
    encoders: Mapping[str, str] = field(default_factory=dict)

    def canonical_name(self, name: str) -> str | None:
        """The canonical name of a checkpoint's tensor; None for buffers that are not weights, and for tensors of an encoder.

        Raises `UnsupportedModelError` for a module that the family does not have.
        """
        if name.endswith((*_BUFFERS, *self.buffers)) or name.startswith(tuple(self.encoders)):
            return None
        if not self.modules:
            return name
        module, _, kind = name.removeprefix(self.prefix).rpartition(".")
        number = re.search(r"(?<=\.)\d+(?=\.)", module)
        pattern = module if number is None else f"{module[: number.start()]}{{}}{module[number.end() :]}"
        if pattern not in self.modules:
            raise UnsupportedModelError(f"the checkpoint holds '{name}', which no {self.name} decoder has")
        return f"{self.modules[pattern].format(number and number[0])}.{kind}"


def require(values: Json, option: str, allowed: tuple[object, ...]) -> None:
    """Raises `UnsupportedModelError` unless `option` has one of the `allowed` values. The first of them is the
    default."""
    if values.get(option, allowed[0]) not in allowed:
        raise UnsupportedModelError(f"{option}={values[option]!r} is not supported; allowed: {allowed}")
