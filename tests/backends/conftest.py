"""Bundles that several files of this room read, written once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory, tiny_model_dir):
    """(family, bits, group) → bundle of the base alone."""
    from motet.export.bundle_writer import export_bundle

    root = tmp_path_factory.mktemp("cpu")

    def make(family, bits=8, group=32):
        path = root / f"{family}-{bits}-{group}"
        if not path.exists():
            export_bundle(tiny_model_dir(family), path, bits=bits, group_size=group)
        return path

    return make
