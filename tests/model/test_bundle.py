"""What a manifest says of members and graphs."""

from __future__ import annotations

import json

import pytest
from helpers.models import make_tail
from motet.export.bundle_writer import export_bundle
from motet.runtime.errors import BundleError
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.members import MemberKind, have_tails

BASE, TAIL, ADAPTER = MemberKind.BASE, MemberKind.TAIL, MemberKind.ADAPTER


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([BASE], False),
        ([TAIL], False),
        ([ADAPTER], False),
        ([BASE, BASE], True),
        ([BASE, TAIL], True),
        ([BASE, ADAPTER], False),
        ([ADAPTER, ADAPTER], False),
        ([TAIL, ADAPTER], True),
    ],
)
def test_who_has_tails(kinds, expected):
    assert have_tails(kinds) is expected


def test_a_single_member_has_no_layers_of_its_own(tiny_model_dir, tmp_path):
    model_dir = tiny_model_dir("llama")
    tail = make_tail(model_dir, tmp_path / "t", "t", 1, 0.3)
    alone = Bundle.load(export_bundle(model_dir, tmp_path / "alone", tails={"t": tail}))
    assert (alone.kinds, alone.has_tails, alone.split_layer) == ((TAIL,), False, 4)
    both = Bundle.load(export_bundle(model_dir, tmp_path / "both", tails={"t": tail, "base": None}))
    assert (both.kinds, both.has_tails, both.split_layer) == ((TAIL, BASE), True, 2)


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
