"""What `open_backend` and `open_engine` put together: block sizes, and observers."""

from __future__ import annotations

import shutil

import pytest
from motet.export.bundle_writer import export_bundle
from motet.kernels.native import library
from motet.kernels.native.model import BLOCK_SIZE, PARTS
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.backends.open import open_backend
from motet.runtime.engine.observer import Observer
from motet.runtime.engine.open import open_engine
from motet.runtime.errors import BundleError, ConfigError
from motet.runtime.model.bundle import Bundle


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory, tiny_model_dir):
    return export_bundle(tiny_model_dir("llama"), tmp_path_factory.mktemp("open") / "b")


def block_size(bundle_dir, backend, size):
    config = EngineConfig(backend=backend, block_size=size, max_num_seqs=2, max_model_len=64, threads=2)
    opened = open_backend(Bundle.load(bundle_dir), config)
    try:
        return opened.block_size
    finally:
        opened.close()


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_native_blocks_have_one_size(bundle_dir, backend):
    if not library.is_available():
        pytest.skip("the native kernels were not built")
    assert block_size(bundle_dir, backend, 0) == block_size(bundle_dir, backend, BLOCK_SIZE) == BLOCK_SIZE
    with pytest.raises(ConfigError, match=rf"block_size is 16; .* set it to {BLOCK_SIZE} or 0"):
        block_size(bundle_dir, backend, 16)


def test_onnx_blocks_are_as_long_as_the_context(bundle_dir):
    assert block_size(bundle_dir, "onnx", 0) == block_size(bundle_dir, "onnx", 64) == 64
    with pytest.raises(ConfigError, match=r"block_size is 32; .* set it to 64 or 0"):
        block_size(bundle_dir, "onnx", 32)


def test_the_onnx_cache_has_one_type(bundle_dir):
    config = EngineConfig(backend="onnx", kv_dtype="int8", max_model_len=64, threads=2)
    with pytest.raises(ConfigError, match="kv_dtype is int8, and the onnx backend's KV cache is float32"):
        open_backend(Bundle.load(bundle_dir), config)


@pytest.mark.native
def test_torn_weights_are_a_damaged_bundle(bundle_dir, tmp_path):
    shutil.copytree(bundle_dir, tmp_path / "b")
    weights = tmp_path / "b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BundleError, match="torn or damaged"):
        open_backend(
            Bundle.load(tmp_path / "b", verify=False), EngineConfig(backend="cpu", max_model_len=64, threads=1)
        )


def test_torch_blocks_have_the_size_that_is_asked_for(bundle_dir):
    pytest.importorskip("torch", reason="the torch backend runs on torch")
    assert [block_size(bundle_dir, "torch", size) for size in (0, 4, 32)] == [16, 4, 32]


@pytest.mark.parametrize("value", [-1, 1.5, "16"])
def test_bad_block_sizes_are_refused(value):
    with pytest.raises(ConfigError, match=r"block_size must be an integer of at least 0 .* got"):
        EngineConfig(block_size=value)


def test_an_opened_engine_tells_its_observers(bundle_dir):
    class Ends(Observer):
        def __init__(self):
            self.parts, self.names = {}, []

        def on_step(self, step):
            self.parts = step.parts

        def on_finish(self, request, last):
            self.names.append(request.request_id)

    ends = Ends()
    with open_engine(bundle_dir, EngineConfig(max_model_len=64, threads=1), observers=[ends]) as engine:
        engine.complete([Request("x", ((1, 2, 3),), engine.model.default_ensemble, SamplingParams(4))])
    assert ends.names == ["x"]
    if library.is_available():
        assert set(ends.parts) == set(PARTS)
