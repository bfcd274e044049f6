"""`motet bench isa` on paths that are here: figures from a clock of ours, and bits that really are compared."""

from __future__ import annotations

import json

import pytest
from helpers.native import ISAS
from motet.bench import isa
from motet.kernels.native import library
from motet.runtime.errors import ConfigError

pytestmark = pytest.mark.native


@pytest.mark.skipif(
    library.EMULATED not in ISAS, reason="this CPU has no AVX-512, which the paths with tiles are written in"
)
def test_paths_beside_each_other(bundle_dir, measured_limits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(library, "probe_dot", lambda threads, name: 100.0 * (1 + ISAS.index(name)))
    paths = ["avx512", library.EMULATED, "portable"]
    options = {"batch_sizes": [1, 2], "prompt_tokens": 24, "context": 20, "new_tokens": 6, "repeats": 1, "threads": 2}
    result = isa.run(bundle_dir, tmp_path, paths=paths, **options)
    assert [row["path"] for row in result["paths"]] == paths
    assert [row["bits"] for row in result["paths"]][:2] == ["A", "A"]  # the tiles' are those of the path they stand on
    assert [row["int8_gmac_s"] for row in result["paths"]] == [100.0 * (1 + ISAS.index(name)) for name in paths]
    assert all(set(row["decode_tok_s"]) == {"1", "2"} for row in result["paths"])
    assert json.loads((tmp_path / "isa.json").read_text())["paths"] == result["paths"]
    assert library.EMULATED in (tmp_path / "isa.html").read_text()
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["bench"] == "isa"


@pytest.mark.skipif(len(ISAS) < 2, reason="this CPU runs one path")
def test_other_bits_have_other_letters(bundle_dir, measured_limits, tmp_path, monkeypatch):
    digests = iter("xy")
    monkeypatch.setattr(isa, "_digest", lambda *_: next(digests))
    monkeypatch.setattr(library, "probe_dot", lambda threads, name: 1.0)
    options = {"batch_sizes": [1], "prompt_tokens": 8, "context": 8, "new_tokens": 4, "repeats": 1, "threads": 1}
    result = isa.run(bundle_dir, tmp_path, paths=[ISAS[0], ISAS[-1]], **options)
    assert [row["bits"] for row in result["paths"]] == ["A", "B"]


def test_an_unknown_path_is_refused(bundle_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"does not run the paths \['vax'\]"):
        isa.run(bundle_dir, tmp_path, paths=["vax"])
