"""NVIDIA's AIPerf against the HTTP door: a load generator that is not ours, beside ours."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ...runtime.errors import ConfigError, MotetError

# AIPerf's name of a time → that of `load.summary`. Its inter-token latency is the time per output token after the first.
_TIMES = {
    "time_to_first_token": "ttft_ms",
    "inter_chunk_latency": "icl_ms",
    "inter_token_latency": "tpot_ms",
    "request_latency": "e2e_ms",
}


def measure(
    program: Path,
    address: str,
    model: str,
    bundle: Path,
    *,
    clients: int,
    duration_s: float,
    prompt_tokens: int,
    new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """The figures of `load.summary` that AIPerf has, of a closed loop. `program`: the `aiperf` of its own environment.

    Raises `ConfigError` if it cannot be run, `MotetError` if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="motet-aiperf-") as directory:
        command = [str(program), "profile", "--model", model, "--url", f"http://{address}"]
        command += ["--endpoint-type", "completions", "--streaming", "--use-server-token-count", "--ui", "none"]
        command += ["--tokenizer", str(bundle.resolve()), "--artifact-dir", directory, "--random-seed", str(seed)]
        command += ["--concurrency", str(clients), "--benchmark-duration", str(duration_s)]
        for name, size in (("synthetic-input-tokens", prompt_tokens), ("output-tokens", new_tokens)):
            command += [f"--{name}-mean", str(size), f"--{name}-stddev", "0"]
        command += ["--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120 + 4 * duration_s, check=False)
        except OSError as error:
            raise ConfigError(f"{program} cannot be run: {error}; `make aiperf` installs it") from error
        except subprocess.TimeoutExpired as error:
            raise MotetError(f"AIPerf did not end within {error.timeout:.0f} s") from error
        exported = Path(directory) / "profile_export_aiperf.json"
        if done.returncode or not exported.is_file():
            raise MotetError(f"AIPerf failed: {(done.stderr or done.stdout)[-2000:]}")
        return figures(json.loads(exported.read_bytes()))


def figures(exported: dict[str, Any]) -> dict[str, Any]:
    """AIPerf's JSON in the names of `load.summary`."""
    return {
        "version": exported["aiperf_version"],
        "requests": round(exported["request_count"]["avg"]),
        "requests_s": exported["request_throughput"]["avg"],
        "tokens_s": exported["output_token_throughput"]["avg"],
        **{own: {p: exported[name][p] for p in ("p50", "p90", "p99")} for name, own in _TIMES.items()},
    }
