"""One command for a GPU machine: all figures beside the goals, and all checks, in nine minutes at most.

    python3 bench/gpu/h200.py [--out bench/results] [--minutes 9] [--again]

It runs from the source tree, installed or not, on an H200 or another NVIDIA GPU with 40 GB or more. The stages stand in
`h200_stages`, the figures that matter most first. Each runs in a process group of its own, which is ended, with all
that it started, when its time is up; so none holds memory that the next one needs. What a stage prints is in
`out/h200/STAGE.log`, its result so far in `out/h200/STAGE.json`; `out/h200.json` has all of them, and is written after
each. A run goes on where an earlier one of the same sources, versions and GPU stopped; `--again` begins anew. It has
not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

# name of one of the `figures` → (at least or at most, limit)
GOALS: dict[str, tuple[str, float]] = {
    "8B bf16, batch 1, tok/s": (">=", 250),
    "8B bf16, batch 1, share of bandwidth": (">=", 0.8),
    "8B 8 bits, batch 1, tok/s": (">=", 420),
    "8B 4 bits, batch 1, tok/s": (">=", 650),
    "8B bf16, batch 64, tok/s": (">=", 8000),
    "1B bf16, batch 1, tok/s": (">=", 1100),
    "4 members × 2-layer tails, batch 1, times one model": ("<=", 1.2),
    "mix_sample, greedy, share of bandwidth": (">=", 0.8),
    "mix_sample, drawn, share of bandwidth": (">=", 0.8),
    "mix_sample, drawn, times faster than eager": (">=", 4),
    "mix_sample, drawn, times faster than torch.compile": (">=", 1.5),
    "fused head, batch 64, times faster than head + mix_sample": (">=", 1),
    "times transformers, batch 1": (">=", 4),
    "times transformers, batch 64": (">=", 10),
}

_PROBE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
_SPARE_S = 10.0  # kept of the minutes for ending a stage and writing


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Name → figure, for the goals whose figures were measured."""
    found: dict[str, float] = {}
    rows = {
        (name, row["batch_size"]): row
        for name, measured in result.get("decode", {}).items()
        if isinstance(measured, list)
        for row in measured
    }
    for (name, size), row in rows.items():
        found[f"{name}, batch {size}, tok/s"] = row["tok_s"]
        found[f"{name}, batch {size}, share of bandwidth"] = row["share_of_copy_bandwidth"]
    if ("8B bf16, 4 members", 1) in rows and ("8B bf16", 1) in rows:
        ratio = rows["8B bf16, 4 members", 1]["step_ms"] / rows["8B bf16", 1]["step_ms"]
        found["4 members × 2-layer tails, batch 1, times one model"] = ratio
    kernels = result.get("kernels", [])
    by_name = {row["case"]: row for row in kernels} if isinstance(kernels, list) else {}
    for kind, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        name = f"mix_sample 256 rows, 1 members, temperature {temperature}"
        if name in by_name:
            found[f"mix_sample, {kind}, share of bandwidth"] = by_name[name]["share_of_copy_bandwidth"]
        for other, label in (("eager", "eager"), ("compiled", "torch.compile")):
            if f"{name}: {other}" in by_name:
                found[f"mix_sample, {kind}, times faster than {label}"] = by_name[f"{name}: {other}"][
                    "times_slower_than"
                ][1]
    two = by_name.get("mix_head_sample, 64 requests: head, then mix_sample")
    if two:
        found["fused head, batch 64, times faster than head + mix_sample"] = two["times_slower_than"][1]
    for size, rate in result.get("transformers", {}).items():
        if ("8B bf16", int(size)) in rows:
            found[f"times transformers, batch {size}"] = rows["8B bf16", int(size)]["tok_s"] / rate
    return found


def verdicts(found: dict[str, float], device: str = "H200") -> list[dict[str, Any]]:
    """Each goal with its figure and whether it is met: None if there is no figure, and for a speed on another GPU than
    the H200 that the goals are for."""
    rows = []
    for name, (sense, limit) in GOALS.items():
        value = found.get(name)
        is_elsewhere = name.endswith("tok/s") and "H200" not in device
        met = None if value is None or is_elsewhere else value >= limit if sense == ">=" else value <= limit
        rows.append({"goal": name, "wanted": f"{sense} {limit:g}", "found": value, "met": met})
    return rows


def run_limited(command: Sequence[str], log: Path, wait: Callable[[subprocess.Popen[bytes]], Any]) -> int | None:
    """Run a command in a process group of its own, its output in `log`. Returns its exit status; None if `wait` raised
    `TimeoutExpired`. All processes of the group have ended then."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait(process)
            return process.returncode
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def kept(path: Path, key: str) -> dict[str, Any]:
    """A stage's file of an earlier run, if it was made under this key; else nothing."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("key") == key else {}


def sources_key(root: Path, device: str) -> str:
    """What figures depend on: the sources, the versions of the packages, the GPU."""
    digest = hashlib.sha256(device.encode())
    for name in ("torch", "triton"):
        try:
            digest.update(metadata.version(name).encode())
        except metadata.PackageNotFoundError:
            digest.update(b"-")
    for folder in ("kernels/triton", "kernels/oracle", "runtime", "bench/gpu"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def gather(folder: Path, key: str, device: str) -> dict[str, Any]:
    """All that the stages found, with the figures and the verdicts."""
    stages = importlib.import_module("motet.bench.gpu.h200_stages")
    files = {stage.name: kept(folder / f"{stage.name}.json", key) for stage in stages.STAGES}
    results = {name: found["result"] for name, found in files.items() if found.get("result") is not None}
    result: dict[str, Any] = {
        **results.get("machine", {"machine": {"device": device}, "limits": {}}),
        "context": stages.CONTEXT,
        "decode": {name: results[name] for name in stages.DECODE if name in results},
        **{name: results[name] for name in ("kernels", "slices", "tests", "transformers") if name in results},
        "errors": {name: found["error"] for name, found in files.items() if found.get("error")},
        "seconds": {name: found["seconds"] for name, found in files.items() if "seconds" in found},
    }
    result["figures"] = figures(result)
    result["goals"] = verdicts(result["figures"], device)
    return result


def _store(path: Path, content: dict[str, Any]) -> None:
    """Replace the file at once, so that a stage that is ended leaves a whole one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def run_stages(out: Path, key: str, device: str, end: float) -> None:
    """Run the stages that are not complete, until the clock reads `end`."""
    stages = importlib.import_module("motet.bench.gpu.h200_stages")
    folder = out / "h200"
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages.STAGES:
        path, start = folder / f"{stage.name}.json", time.monotonic()
        if kept(path, key).get("complete"):
            continue
        seconds = min(stage.seconds, end - start - _SPARE_S)
        error: str | None
        if seconds < 15:
            error = "not run: the time was up"
        else:
            path.unlink(missing_ok=True)
            command = [sys.executable, __file__, "--stage", stage.name, "--out", str(out), "--key", key]
            log = folder / f"{stage.name}.log"
            status = run_limited(command, log, partial(subprocess.Popen.wait, timeout=seconds))
            error = None
            if status != 0:
                error = f"ended after {seconds:.0f} s" if status is None else f"exit status {status}"
                error += f"; the end of {log.name}: {log.read_bytes()[-1500:].decode(errors='replace')}"
        found = {"key": key, "result": None, "complete": False, **kept(path, key)}
        _store(path, found | {"error": error, "seconds": time.monotonic() - start})
        _store(out / "h200.json", gather(folder, key, device))


def _run_one(root: Path, arguments: argparse.Namespace) -> int:
    stages = importlib.import_module("motet.bench.gpu.h200_stages")
    folder = arguments.out / "h200"
    limits = (kept(folder / "machine.json", arguments.key).get("result") or {}).get("limits", {})
    task = stages.Task(root, limits)

    def write(result: Any, is_complete: bool) -> None:
        content = {"key": arguments.key, "result": result, "complete": is_complete}
        _store(folder / f"{arguments.stage}.json", content)

    stages.run_here(arguments.stage, task, write)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and measure Motet's GPU path on this machine.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--again", action="store_true", help="measure anew what an earlier run has")
    for name in ("--stage", "--key"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    root = importlib.import_module("source_tree").use()
    if arguments.stage:
        return _run_one(root, arguments)
    # Asked in another process: one that talks to the GPU holds some of its memory.
    device = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True).stdout.strip()
    if not device:
        print(
            "bench/gpu/h200.py: torch finds no GPU here; it measures one, and has nothing to do without",
            file=sys.stderr,
        )
        return 2
    key = sources_key(root, device)
    if arguments.again:
        for path in (arguments.out / "h200").glob("*.json"):
            path.unlink()
    run_stages(arguments.out, key, device, end)
    result = gather(arguments.out / "h200", key, device)
    for row in result["goals"]:
        print(f"{row['goal']:60} {row['wanted']:>8} {row['found'] if row['found'] is None else round(row['found'], 3)}")
    tests = result.get("tests", {}).get("exit_code")
    print(json.dumps({"errors": result["errors"], "tests": tests, "goals": result["goals"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
