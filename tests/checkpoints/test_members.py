"""The one list of member kinds: formats on disk, methods of training, options of the command."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make_tail
from motet.export_cli import export
from motet.finetune.params import METHODS, TuneParams
from motet.runtime.checkpoints.huggingface import read_config
from motet.runtime.checkpoints.members.adapter import write_adapter
from motet.runtime.checkpoints.members.files import first_layer
from motet.runtime.checkpoints.members.registry import FORMATS, format_at
from motet.runtime.checkpoints.members.tail import write_tail
from motet.runtime.errors import ConfigError, NotFoundError
from motet.runtime.model.members import MemberKind

BASE = {"base": {"name": "x", "digest": "y"}}
PAIR = {"model.layers.3.mlp.up_proj.lora_a": torch.ones(2, 64), "model.layers.3.mlp.up_proj.lora_b": torch.ones(128, 2)}


def test_a_directory_says_its_kind(tiny_model_dir, tmp_path):
    config = read_config(tiny_model_dir("llama"))
    make_tail(tiny_model_dir("llama"), tmp_path / "t", "t", 1, 0.1)
    write_adapter(tmp_path / "x", config, PAIR, BASE)
    assert [format_at(tmp_path / name).kind for name in "tx"] == [MemberKind.TAIL, MemberKind.ADAPTER]
    assert format_at(tmp_path / "x").read_manifest(tmp_path / "x")["kind"] == "adapter"
    with pytest.raises(NotFoundError, match=r"no member at .* \(tail\.json or adapter_config\.json is missing\)"):
        format_at(tmp_path)
    with pytest.raises(ConfigError, match="exists and is not a tail"):
        write_tail(tmp_path / "x", {}, {})
    with pytest.raises(ConfigError, match="exists and is not an adapter"):
        write_adapter(tmp_path / "t", config, PAIR, BASE)


def test_every_kind_is_whole():
    """What is trained has a format, and every format an option of `motet export` and a method."""
    assert set(FORMATS) == {kind for kind in MemberKind if kind.methods}
    assert sorted(METHODS) == ["full", "lora", "projector", "qlora", "tail"]
    assert [TuneParams(method=m).kind.value for m in ("tail", "full", "lora", "qlora", "projector")] == [
        "tail",
        "tail",
        "adapter",
        "adapter",
        "base",
    ]
    options = {kind.flag for kind in MemberKind}
    assert options == {"tail", "lora"} <= set(export.__annotations__)


def test_the_first_layer_of_tensors():
    assert first_layer(PAIR, 4) == 3
    assert first_layer(["model.norm.weight", "model.layers.10.x", "model.layers.9.y"], 12) == 9
    assert first_layer(["model.norm.weight", "lm_head.weight"], 12) == 12
