"""`make demo`: the whole chain on a real model, from a pull to a measured, served ensemble.

    pull → tune two members → export one bundle → serve it and stream four mixes → summarise 20 documents → bench

Results of an earlier run are kept (the model, the tails, the bundle, the summaries). Everything is under .motet/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from ..finetune.data.dataset import load_dataset
from ..finetune.params import TuneParams
from ..runtime.checkpoints.huggingface import checkpoint_digest
from ..runtime.checkpoints.members.tail import read_tail
from ..runtime.checkpoints.store import resolve_model
from ..runtime.client.client import Client
from ..runtime.errors import MotetError
from ..runtime.model.bundle import Bundle
from ..tables import table
from .lib.servers import server_process

MODEL = "smollm2-135m"
HOME = Path(os.environ.get("MOTET_HOME", ".motet"))
TAILS = {"code": "stdlib-code", "docs": "stdlib-docs"}
BUNDLE = HOME / "bundles" / "demo"
MIXES = ({"code": 1.0}, {"docs": 1.0}, {"code": 0.5, "docs": 0.5}, {"code": 1.5, "docs": -0.5})
QUESTION = (
    "Summarise what this Python function does in one sentence.\n\n```python\n"
    "def chunks(items, size):\n    for start in range(0, len(items), size):\n        yield items[start:start + size]\n```"
)
NUM_SUMMARIES = 20

console = Console()


def main() -> None:
    started = time.monotonic()
    os.environ["MOTET_HOME"] = str(HOME)
    HOME.mkdir(parents=True, exist_ok=True)
    _step("1. Pull a real model")
    _motet("pull", MODEL)
    _step("2. Fine-tune two members: the last two layers of a frozen base")
    _tune()
    _step("3. Quantise base and members into one bundle, and compare it with fp32")
    _export()
    _step("4. Serve it over gRPC: four requests at once, each with its own mix")
    _stream()
    _step(f"5. Summarise {NUM_SUMMARIES} documents offline")
    _summarise()
    _step("6. Measure")
    _motet("bench", "decode", str(BUNDLE), "--out", str(HOME / "results"), "--batch-sizes", "1,8,16", "--repeats", "3")
    print(f"\nThe demo took {time.monotonic() - started:.0f} s. Everything it made is under {HOME}/.")


def _step(title: str) -> None:
    console.rule(f"[bold]{title}", align="left")


def _motet(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "motet.cli", *arguments], check=True)


def _tune() -> None:
    rows = []
    for name, data in TAILS.items():
        out = HOME / "tails" / name
        if not _is_tuned(out, data):
            _motet("tune", MODEL, "--data", data, "--out", str(out))
        manifest, _ = read_tail(out)
        metrics = manifest["metrics"]
        before, after = metrics["validation_loss_before"], metrics["validation_loss_after"]
        rows.append([name, data, f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}"])
    console.print(table("validation loss, nats per token", ["member", "data", "before", "after", "change"], rows))


def _is_tuned(out: Path, data: str) -> bool:
    """Whether `out` holds the tail that the demo would train: of this base and data, with these settings."""
    try:
        manifest, _ = read_tail(out)
        return bool(
            manifest["base"]["digest"] == checkpoint_digest(resolve_model(MODEL))
            and manifest["data"]["digest"] == load_dataset(data).digest
            and manifest["hyper_parameters"] == TuneParams().to_dict()
        )
    except (MotetError, KeyError):
        return False


def _export() -> None:
    arguments = ["export", MODEL, str(BUNDLE)]
    for name in TAILS:
        arguments += ["--tail", f"{name}={HOME / 'tails' / name}"]
    tails = {name: read_tail(HOME / "tails" / name)[0]["sha256"] for name in TAILS}
    try:
        made_of = {m["name"]: m["provenance"]["sha256"] for m in Bundle.load(BUNDLE).manifest["members"]}
        report = json.loads((BUNDLE / "parity.json").read_bytes())
    except (MotetError, OSError, KeyError):
        made_of = {}
    if made_of != tails:
        _motet(*arguments)
        return
    rows = [[m["name"], f"{m['nll_change']:+.2%}", f"{m['kl']:.4f}", f"{m['top1']:.1%}"] for m in report["members"]]
    title = f"{report['bits']} bits, {report['size_bytes'] / 1e6:.0f} MB (made by an earlier run)"
    console.print(table(title, ["member", "ΔNLL", "KL", "top-1 equal"], rows))


def _stream() -> None:
    """Four streams at once. Each prints a line as soon as it has one, so the lines interleave."""
    with server_process(BUNDLE) as address, ThreadPoolExecutor(len(MIXES)) as pool:
        print(f"serving on {address}\n{QUESTION}\n", flush=True)
        list(pool.map(lambda mix: _one_stream(address, mix), MIXES))


def _one_stream(address: str, mix: dict[str, float]) -> None:
    label = "  ".join(f"{name} {value:+.1f}" for name, value in mix.items())
    pending, started = "", time.monotonic()
    messages = [{"role": "user", "content": QUESTION}]
    with Client(address) as client:
        for delta in client.generate(messages, mix=mix, temperature=0.0, max_tokens=48):
            pending += delta.text
            if len(pending) > 60 or delta.finish_reason is not None:
                print(f"[{time.monotonic() - started:5.2f} s] {label:22} │ {pending}", flush=True)
                pending = ""


def _summarise() -> None:
    documents = load_dataset("stdlib-docs").splits["test"][:NUM_SUMMARIES]
    source, out = HOME / "documents.jsonl", HOME / "summaries.jsonl"
    records = [{"id": f"doc-{i}", "text": d.messages[0]["content"]} for i, d in enumerate(documents)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--bundle", str(BUNDLE), "--mix", "code=0.3,docs=0.7", "--max-summary-tokens", "48"]
    _motet("summarise", str(source), str(out), *arguments)
    for line in out.read_text().splitlines():
        record = json.loads(line)
        text = record.get("summary", record.get("error", {}))
        print(f"{record['id']:7} {' '.join(str(text).split())[:110]}")


if __name__ == "__main__":
    main()
