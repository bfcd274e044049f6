"""What a manifest says of members and graphs."""

from __future__ import annotations

import json

import pytest
from helpers.models import make_adapter, make_tail
from motet.export.bundle_writer import export_bundle
from motet.runtime.errors import BundleError
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.members import MemberKind

BASE, TAIL, ADAPTER = MemberKind.BASE, MemberKind.TAIL, MemberKind.ADAPTER


def test_a_single_member_has_no_layers_of_its_own(tiny_model_dir, tmp_path):
    model_dir = tiny_model_dir("llama")
    tail = make_tail(model_dir, tmp_path / "t", "t", 1, 0.3)
    alone = Bundle.load(export_bundle(model_dir, tmp_path / "alone", tails={"t": tail}))
    assert (alone.kinds, alone.has_tails, alone.split_layer) == ((TAIL,), False, 4)
    both = Bundle.load(export_bundle(model_dir, tmp_path / "both", tails={"t": tail, "base": None}))
    assert (both.kinds, both.has_tails, both.split_layer) == ((TAIL, BASE), True, 2)
    assert (alone.tails, both.tails, both.tail_of) == ((), (None, "t"), (1, 0))


def test_members_without_layers_of_their_own_share_a_tail(tiny_model_dir, tmp_path):
    model_dir = tiny_model_dir("llama")
    tail = make_tail(model_dir, tmp_path / "t", "t", 1, 0.3)
    loras = {name: make_adapter(model_dir, tmp_path / name, 2, layers=3) for name in "xy"}
    bundle = Bundle.load(export_bundle(model_dir, tmp_path / "b", tails={"t": tail, "base": None}, loras=loras))
    assert (bundle.kinds, bundle.split_layer) == ((TAIL, BASE, ADAPTER, ADAPTER), 1)
    assert (bundle.tails, bundle.tail_of) == ((None, "t"), (1, 0, 0, 0))


def test_an_inconsistent_manifest(tiny_model_dir, tmp_path):
    path = export_bundle(tiny_model_dir("llama"), tmp_path / "b", tails={"a": None, "b": None}, num_tail_layers=2)
    manifest = json.loads((path / "motet.json").read_text())
    graphs = manifest["graphs"]
    for change, message in (
        ({"split_layer": 5}, "split_layer must be in 0…4, the manifest has 5"),
        ({"graphs": graphs | {"tails": {"a": "tail-a.onnx"}}}, r"tails are \['a'\], the members with one \['a', 'b'\]"),
        ({"graphs": {"trunk": "trunk.onnx"}}, "inconsistent"),
    ):
        (path / "motet.json").write_text(json.dumps(manifest | change))
        with pytest.raises(BundleError, match=message):
            Bundle.load(path)
