"""The paged cache of the torch backend: how many blocks it takes, and which types a GPU can hold."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the torch backend runs on torch")

from helpers.torch_backend import config, options  # noqa: E402
from motet.runtime.backends.torch.backend import TorchBackend  # noqa: E402
from motet.runtime.backends.torch.paged_cache import DTYPES, SHARE_OF_FREE, blocks_that_fit, cache_dtype  # noqa: E402
from motet.runtime.errors import ConfigError, UnavailableError  # noqa: E402
from motet.runtime.model.bundle import Bundle  # noqa: E402


@pytest.mark.parametrize("free", [None, 10**6, 101 * 1000])
def test_the_pool_takes_what_is_wanted_where_it_fits(free):
    assert blocks_that_fit(1000, 89, free) == 89


def test_the_pool_takes_what_fits_beside_the_dummy_block():
    blocks = blocks_that_fit(1000, 10**9, 101 * 1000)
    assert (blocks + 1) * 1000 <= SHARE_OF_FREE * 101 * 1000 < (blocks + 2) * 1000


def test_a_pool_without_room_for_a_block_is_refused():
    assert blocks_that_fit(1000, 5, 2500) == 1
    with pytest.raises(UnavailableError, match=r"a block of the KV cache takes 0\.0 MB; use a smaller bundle"):
        blocks_that_fit(1000, 5, 2000)


@pytest.mark.parametrize("capability", [75, 80, 86])
def test_fp8_is_refused_on_a_gpu_without_it(torch_bundles, monkeypatch, capability):
    def unread(*_):
        raise AssertionError("the weights were read first")

    monkeypatch.setattr("motet.runtime.backends.torch.backend.load_weights", unread)
    with pytest.raises(ConfigError, match=rf"capability 8\.9 .* has {capability / 10}: use kv_dtype int8"):
        TorchBackend(Bundle.load(torch_bundles / "base"), config(kv_dtype="fp8"), options(capability=capability))


def test_other_types_are_held_by_every_gpu():
    for capability in (None, 80, 89, 90, 100, 120):
        found = {name: cache_dtype(name, torch.float32, capability) for name in DTYPES if name != "fp8"}
        assert found == {name: DTYPES[name] for name in found}
        assert cache_dtype("auto", torch.float16, capability) is torch.float16
        if capability is None or capability >= 89:
            assert cache_dtype("fp8", torch.float32, capability) is torch.float8_e4m3fn
