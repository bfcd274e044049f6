"""Matrix tiles compute the bits of the path that they stand on: random decoders of every shape, long prompts, all members."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz.bundles import write_bundle
from helpers.native import ISAS, tokens_of
from motet.kernels.native import library
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.cpu.backend import CpuBackend

pytestmark = pytest.mark.native
PAIRS = [(tiles, plain) for tiles, plain in ((library.EMULATED, "avx512"), ("amx", "avx512bf16")) if tiles in ISAS]
DECODERS = 100


@pytest.mark.skipif(not PAIRS, reason="this CPU has no AVX-512, which the paths with tiles are written in")
@pytest.mark.parametrize("seed", range(DECODERS))
def test_tiles_change_no_bit(tmp_path, seed):
    """Groups of 16 to 128, 4, 8 and 32 bits, heads of 16 to 128, experts, low-rank updates, windows, soft caps."""
    rng = np.random.default_rng(seed)
    bundle = write_bundle(tmp_path / "bundle", rng)
    length = int(rng.integers(7, bundle.config.max_position_embeddings + 1))
    tokens = tokens_of(length, seed, bundle.config.vocab_size).tolist()
    kv = "bf16" if seed % 5 == 0 else "int8"
    config = EngineConfig(max_num_seqs=1, max_model_len=length, threads=2, kv_dtype=kv, backend="cpu")
    for tiles, plain in PAIRS:
        found, expected = (
            [backend.score(tokens, member) for member in range(len(bundle.members))]
            for backend in (CpuBackend(bundle, config, isa=isa) for isa in (tiles, plain))
        )
        assert np.array_equal(found, expected, equal_nan=True)


def test_a_path_for_tests_is_not_chosen():
    assert ISAS[0] != library.EMULATED
    assert library.EMULATED not in ISAS or ISAS[-1] == library.EMULATED
