"""A tiny model that learned to name pictures, made once for the files that ask what it can do and what is refused."""

from __future__ import annotations

import pytest
from helpers.colours import train_on_pictures, write_base, write_pictures, write_records, write_siglip


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """(a folder with a base model, a tower, records and the model that was trained on them, its manifest)."""
    folder = tmp_path_factory.mktemp("colours")
    write_base(folder / "base")
    write_siglip(folder / "tower")
    write_records(folder / "data.jsonl", write_pictures(folder / "pictures"), "pictures/")
    return folder, train_on_pictures(folder, "seeing")
