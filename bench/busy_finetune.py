"""`motet bench busy-finetune`: training while another process burns one core, against training alone.

PyTorch's OpenMP threads meet at the end of every operation. If they spin there, they take the core from the thread that they
wait for; `motet` makes them sleep soon (`motet.openmp`), unless the environment says otherwise. To measure libgomp's default,
run this with `GOMP_SPINCOUNT=300000`. Quiet and busy runs alternate.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..finetune.params import TuneParams
from ..finetune.training.loop import Watch
from ..finetune.training.train import RunData, Workbench, run
from ..finetune.training.trunk_cache import TrunkCache
from ..pages import Bars, Part, Table
from ..runtime.checkpoints.store import resolve_model
from .busy import burner
from .lib.report import machine, write


def run_bench(model: str, data: str, out: Path, *, examples: int = 64, repeats: int = 3) -> dict[str, Any]:
    """Measure, write `out/busy-finetune.json` and `.html`, print the table and one JSON line."""
    params = TuneParams(layers=2, examples=examples, validation_examples=4, epochs=1, evaluations=1, max_length=128)
    speeds: dict[str, list[float]] = {"quiet": [], "busy": []}
    with tempfile.TemporaryDirectory(prefix="motet-busy-") as folder:
        work = Path(folder)
        bench = Workbench(resolve_model(model), data, TrunkCache(work / "cache"))
        loaded = bench.load(params, {"train": params.examples, "validation": params.validation_examples})
        for repeat in range(repeats + 1):  # the first is a warm-up and is not counted
            quiet = _speed(bench, work / f"quiet-{repeat}", params, loaded)
            with burner():
                busy = _speed(bench, work / f"busy-{repeat}", params, loaded)
            if repeat:
                speeds["quiet"].append(quiet)
                speeds["busy"].append(busy)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result = {
        "model": bench.model_dir.name,
        "data": data,
        "params": params.to_dict(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "KMP_"))
        },
        "tokens_per_s": speeds,
        "share": medians["busy"] / medians["quiet"],
    }
    write("busy-finetune", result, _parts(result), out)
    return result


def _parts(result: dict[str, Any]) -> list[Part]:
    speeds = result["tokens_per_s"]
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    title = f"{result['model']}, tails of 2 layers, {result['threads']} threads, {result['environment']}"
    rows = [[name, f"{medians[name]:.0f}", f"{medians[name] / medians['quiet']:.0%}"] for name in medians]
    spans = {"median": [(min(values), max(values)) for values in speeds.values()]}
    bars = Bars("Training", "tokens/s", list(medians), {"median": list(medians.values())}, spans)
    return [Table(title, ["", "tokens/s", "share"], rows), bars]


def _speed(bench: Workbench, out: Path, params: TuneParams, loaded: RunData) -> float:
    """Tokens per second of a run's batches after the first."""
    times: list[float] = []
    watch = Watch(stepped=lambda _step, _loss: times.append(time.monotonic()))
    run(bench, out, params, name=out.name, watch=watch, loaded=loaded)
    tokens = sum(len(item.encoded.token_ids) for item in loaded.parts["train"])
    return tokens * (len(times) - 1) / len(times) / (times[-1] - times[0])
