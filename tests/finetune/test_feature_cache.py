"""The feature cache: nothing torn, bounded, and never what a run still needs."""

from __future__ import annotations

import os

import pytest
import torch
from motet.finetune.data import feature_cache
from motet.finetune.data.feature_cache import FeatureCache
from motet.runtime.errors import ConfigError, UnavailableError

FEATURES = torch.randn(2, 5, 16).to(torch.bfloat16)  # 320 bytes, and a header


def test_what_is_written_is_read(tmp_path):
    cache = FeatureCache(tmp_path / "features", 10_000)
    assert cache.read("key") is None
    assert torch.equal(cache.write("key", FEATURES.float()), FEATURES)
    assert torch.equal(FeatureCache(tmp_path / "features", 10_000).read("key"), FEATURES)
    assert cache.read("other") is None
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["key.safetensors"]


@pytest.mark.parametrize("damage", ["short", "changed", "no file"])
def test_a_damaged_entry_is_computed_again(tmp_path, damage):
    cache = FeatureCache(tmp_path, 10_000)
    cache.write("key", FEATURES)
    path = tmp_path / "key.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {"short": content[:-20], "changed": content[:-2] + b"\0\1", "no file": b"nothing of the kind"}[damage]
    )
    assert cache.read("key") is None
    assert not path.exists()


def test_an_entry_that_cannot_be_opened_stays(tmp_path, monkeypatch):
    """Too many open files, or another user's entry: it is computed again, and not removed."""
    cache = FeatureCache(tmp_path, 10_000)
    cache.write("key", FEATURES)

    def refuse(*_given):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(feature_cache, "safe_open", refuse)
    assert cache.read("key") is None
    monkeypatch.undo()
    monkeypatch.setattr(os, "utime", refuse)
    assert torch.equal(cache.read("key"), FEATURES)


def test_the_oldest_make_room_and_those_in_use_stay(tmp_path):
    size = 0
    for number in range(3):
        FeatureCache(tmp_path, 10**6).write(f"old{number}", FEATURES)
        os.utime(tmp_path / f"old{number}.safetensors", (number, number))
        size = (tmp_path / f"old{number}.safetensors").stat().st_size
    cache = FeatureCache(tmp_path, 3 * size)
    kept = cache.read("old0")
    cache.write("new", FEATURES)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["new", "old0", "old2"]
    os.unlink(tmp_path / "old0.safetensors")
    assert torch.equal(kept, FEATURES), "what is mapped outlives its name"
    cache.write("more", FEATURES)
    cache.write("most", FEATURES)
    with pytest.raises(ConfigError, match="raise --cache-gb"):
        cache.write("too many", FEATURES)


def test_a_full_disk_is_said(tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(UnavailableError, match="cannot be written"):
        FeatureCache(tmp_path / "file", 10_000).write("key", FEATURES)
