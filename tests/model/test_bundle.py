"""What a manifest says of members and graphs."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from helpers.models import make_adapter, make_tail
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.model_info import MemberOrigin
from motet.runtime.client.client import Client
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import BundleError
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.files import file_digest
from motet.runtime.model.members import MemberKind
from motet.runtime.serve.local import serve_engine

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


def test_where_members_come_from(small, tmp_path):
    path = copied(small, tmp_path)
    manifest = json.loads((path / "motet.json").read_text())
    manifest["members"][0]["provenance"] = {
        "hyper_parameters": {"method": "lora"},
        "data": {"name": "letters", "trained_on": 40},
        "privacy": {"epsilon": 3.5, "delta": 1e-4},
    }
    (path / "motet.json").write_text(json.dumps(manifest))
    with Engine.from_bundle(path, EngineConfig(threads=1)) as engine, serve_engine(engine) as address:
        with Client(address) as client:
            [model] = client.models()
        assert model.origins == (MemberOrigin("base", "lora", "letters", 40, 3.5, 1e-4),)
        assert model.digest == engine.model.digest != ""
    assert Bundle.load(small).origins == (MemberOrigin("base"),)
    manifest["members"][0]["provenance"]["privacy"] = {"epsilon": "none"}
    (path / "motet.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="provenance of member"):
        Engine.from_bundle(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: [one.update(mix=mix) for one, mix in zip(manifest["members"], (0.25, 0.75), strict=True)],
        lambda manifest: manifest["members"][0].update(temperature=2.0),
        lambda manifest: manifest.update(space="probs"),
        lambda manifest: manifest.update(calibration={"intercept": 0.5, "probability": 1.0, "disagreement": -1.0}),
    ],
    ids=["mix", "temperature", "space", "calibration"],
)
def test_the_digest_is_of_all_that_an_answer_depends_on(pair, tmp_path, change):
    """The files are the same ones."""
    path = Path(shutil.copytree(pair, tmp_path / "b"))
    assert Bundle.load(path).digest == Bundle.load(pair).digest
    manifest = json.loads((path / "motet.json").read_text())
    change(manifest)
    (path / "motet.json").write_text(json.dumps(manifest))
    assert Bundle.load(path).digest != Bundle.load(pair).digest


@pytest.fixture(scope="module")
def pair(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("pair") / "b"
    return export_bundle(tiny_model_dir("llama"), path, tails={"a": None, "b": None}, num_tail_layers=1, graphs=False)


# ---- hostile files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tiny_model_dir, tmp_path_factory):
    return export_bundle(tiny_model_dir("llama"), tmp_path_factory.mktemp("hostile") / "b", graphs=False)


def copied(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "b"))


def agree(path, name="model.safetensors"):
    """The author of a bundle writes the digests too."""
    manifest = json.loads((path / "motet.json").read_text())
    manifest["files"][name] = file_digest(path / name)
    (path / "motet.json").write_text(json.dumps(manifest))


def symbolic(file, other):
    file.symlink_to(other)


def hard(file, other):
    os.link(other, file)


@pytest.mark.parametrize("link", [symbolic, hard])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "motet.json"])
def test_links_are_refused(small, tmp_path, link, name):
    path = copied(small, tmp_path)
    (path / name).rename(tmp_path / "elsewhere")
    link(path / name, tmp_path / "elsewhere")
    for verify in (True, False):
        with pytest.raises(BundleError, match="is a link"):
            Bundle.load(path, verify=verify)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ""])
def test_names_that_leave_the_bundle(small, tmp_path, name):
    path = copied(small, tmp_path)
    manifest = json.loads((path / "motet.json").read_text())
    manifest["files"][name] = "0" * 64
    (path / "motet.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="plain file names"):
        Bundle.load(path)


def test_any_changed_byte_is_found(small, tmp_path):
    path = copied(small, tmp_path)
    content = (path / "model.safetensors").read_bytes()
    for at in range(0, len(content), len(content) // 50):
        (path / "model.safetensors").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(BundleError, match="is damaged"):
            Bundle.load(path)


def with_header(change):
    """The weights file with another header."""

    def run(content):
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        name = next(name for name in header if name != "__metadata__")
        change(header, name)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return run


HEADERS = {
    "ten gigabytes": lambda c: struct.pack("<Q", 10 * 2**30) + c[8:],
    "all of memory": lambda c: struct.pack("<Q", 2**64 - 1) + c[8:],
    "empty": lambda c: b"",
    "short": lambda c: c[:5],
    "a pickle": lambda c: b"\x80\x04\x95" + c,
    "no json": lambda c: struct.pack("<Q", 8) + b"xxxxxxxx" + c[16:],
    "a list": lambda c: struct.pack("<Q", 2) + b"[]" + c[8:],
    "nested": lambda c: struct.pack("<Q", 100_000) + b"[" * 100_000 + c,
    "beyond the file": with_header(
        lambda h, n: h[n].update(data_offsets=[2**40, 2**40 + h[n]["data_offsets"][1] - h[n]["data_offsets"][0]])
    ),
    "before the file": with_header(
        lambda h, n: h[n].update(data_offsets=[-8, h[n]["data_offsets"][1] - h[n]["data_offsets"][0] - 8])
    ),
    "another shape": with_header(lambda h, n: h[n].update(shape=[2**30, 2**30])),
    "a negative shape": with_header(lambda h, n: h[n].update(shape=[-1])),
    "another type": with_header(lambda h, n: h[n].update(dtype="F64")),
    "no offsets": with_header(lambda h, n: h[n].pop("data_offsets")),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_weights(small, tmp_path, case):
    """The digests agree, as an author would have it: the file itself is checked before it is used."""
    path = copied(small, tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(HEADERS[case](file.read_bytes()))
    agree(path)
    with pytest.raises(BundleError):
        Engine.from_bundle(path, EngineConfig(threads=1)).close()
