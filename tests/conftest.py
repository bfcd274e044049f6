"""Fixtures: a byte-level tokenizer, tiny random models of every family, the real model."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("motet") is None:  # a machine without an installer: the tree itself
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench" / "gpu"))
    import source_tree

    source_tree.use()

from helpers.models import write_model, write_tokenizer
from motet.kernels.native import library
from motet.runtime.text.tokenizer import Tokenizer

# Triton's kernels are compiled where there is an NVIDIA GPU and interpreted elsewhere; it looks when it is imported.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


ALONE = {
    "bench",
    "cluster",
    "engine",
    "examples",
    "jobs",
    "schedule",
    "serve",
}  # rooms that wait for processes and threads


LONG = {
    "test_native_build.py",
    "test_generate.py",
    "test_house.py",
    "test_ensemble.py",
}  # begin first, or the last runs alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the real model are `network`, for it may have to be pulled. Tests that are `native` need the built library. Whole
    rooms are `alone`; the longest files come first."""
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in ALONE:
            item.add_marker(pytest.mark.alone)
        if "real_model_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.network)
        if item.get_closest_marker("native") is not None and not library.is_available():
            item.add_marker(pytest.mark.skip(reason="the native kernels were not built (no C++ compiler)"))


@pytest.fixture(scope="module", autouse=True)
def torch_threads() -> Iterator[None]:
    """The torch backend sets the number for its process. Files that come after it have the one that pytest began with: of two
    processes with two threads each, on two CPUs, most of the time is spent on waiting for each other."""
    torch = sys.modules.get("torch")  # a module of tests that needs it has imported it
    before = torch.get_num_threads() if torch is not None else 0
    yield
    if torch is not None:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(tokenizer_dir)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family → model directory, made once."""
    root = tmp_path_factory.mktemp("models")
    return lambda family: root / family if (root / family).exists() else write_model(root / family, family)


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """SmolLM2-135M-Instruct; pulled if it is not here yet."""
    from motet.runtime.checkpoints.store import pull

    return pull("smollm2-135m", show_progress=False)
