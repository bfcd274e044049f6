"""Bundles that several files of this room read, written once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory, tiny_model_dir):
    """(family, bits, group) → bundle of the base alone."""
    from helpers.models import EXPERTS
    from motet.export.bundle_writer import export_bundle

    root = tmp_path_factory.mktemp("cpu")

    def make(family, bits=8, group=32):
        path = root / f"{family}-{bits}-{group}"
        if not path.exists():
            size = None if bits == 32 else group
            export_bundle(tiny_model_dir(family), path, bits=bits, group_size=size, graphs=family not in EXPERTS)
        return path

    return make


@pytest.fixture(scope="session")
def torch_bundles(tmp_path_factory, tiny_model_dir):
    """The folder of the bundles that `write_bundles` describes."""
    from helpers.torch_backend import write_bundles

    return write_bundles(tmp_path_factory.mktemp("torch"), tiny_model_dir("llama"))
