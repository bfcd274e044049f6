"""`repro`: repeat a member's training from its manifest, and compare the figures."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.checkpoints.members.registry import format_at
from ...runtime.errors import BundleError, ConfigError, NotFoundError
from ..params import NearDuplicates, TuneParams
from ..training.provenance import environment
from ..training.train import Workbench, run
from ..training.trunk_cache import TrunkCache

TOLERANCE = 1e-6  # nats; another order of additions in threads may change as much
_COMPARED = ("validation_loss_before", "validation_loss_after", "train_loss_after", "steps", "best_step")


@dataclass(frozen=True, slots=True)
class Comparison:
    """`rows`: (figure, recorded value, new value). `changed`: the differences between the environments."""

    rows: tuple[tuple[str, float, float], ...]
    changed: tuple[str, ...]
    same_weights: bool

    @property
    def is_same(self) -> bool:
        return all(abs(old - new) <= TOLERANCE for _, old, new in self.rows)


def repro(directory: Path, model_dir: Path, cache: TrunkCache | None = None) -> Comparison:
    """Repeat the run whose tail or adapter is in `directory`, on the base in `model_dir`. Its result is not kept.

    Raises `NotFoundError`, `BundleError` (another base, other data), `ConfigError` (a private run, whose noise is not kept).
    """
    found = format_at(directory)
    manifest = found.read_manifest(directory)
    if "hyper_parameters" not in manifest or "environment" not in manifest:
        raise NotFoundError(f"'{directory}' has no record of its run; only what `motet tune` made can be repeated")
    params = TuneParams.from_dict(manifest["hyper_parameters"])
    if params.epsilon is not None:
        raise ConfigError("a private run cannot be repeated: its noise is destroyed at its end")
    if "healed" in manifest:
        raise ConfigError(
            f"'{directory}' was healed with a teacher, which its record names; repeat `motet heal` with it"
        )
    data = manifest["data"]
    store = (cache or TrunkCache()) if manifest["cached"] else None
    bench = Workbench(model_dir, data["spec"], store, NearDuplicates(data["near_duplicates"]))
    loaded = bench.load(params, {"train": params.examples, "validation": params.validation_examples})
    for what, old, new in (
        ("base", manifest["base"]["digest"], bench.digest),
        ("data set", data["digest"], bench.dataset.digest),
        ("tokenizer", data["encoded"], loaded.report.encoded),  # or the chat template
    ):
        if old != new:
            raise BundleError(f"the {what} has the digest {new[:12]}…, the run's had {old[:12]}…; use the same {what}")
    with tempfile.TemporaryDirectory(prefix="motet-repro-") as work:
        repeated = run(bench, Path(work) / "run", params, name=manifest["name"], loaded=loaded)
        weights = found.read_manifest(Path(work) / "run")["sha256"]
    rows = tuple((name, float(manifest["metrics"][name]), float(repeated["metrics"][name])) for name in _COMPARED)
    return Comparison(rows, _changes(manifest["environment"]), weights == manifest["sha256"])


def _changes(recorded: Mapping[str, Any]) -> tuple[str, ...]:
    now = environment()
    changed = [f"{n}: {recorded[n]} → {now[n]}" for n in ("threads", "device") if recorded[n] != now[n]]
    if recorded["code"] != now["code"]:
        changed.append(f"code: {recorded['code'][:12]}… → {now['code'][:12]}…")
    old, new = recorded["versions"], now["versions"]
    return (*changed, *(f"{n}: {old.get(n)} → {new.get(n)}" for n in sorted({*old, *new}) if old.get(n) != new.get(n)))
