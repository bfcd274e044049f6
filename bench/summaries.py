"""`motet bench summaries`: summaries of long documents, against what costs less: the first three sentences, and a summary of
the first chunk alone. The documents are the docstrings of the standard library's modules without each module's first paragraph,
which is the reference (ROUGE-L, `rouge-score`)."""

from __future__ import annotations

import ast
import inspect
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score import rouge_scorer

from ..finetune.data.built_in import standard_library
from ..pages import Bars, Part, Table
from ..runtime.api.config import EngineConfig
from ..runtime.engine.engine import Engine
from ..runtime.jobs.records import Record
from ..runtime.jobs.summarise import Summariser
from ..runtime.text.summary import SummariseParams
from .lib.report import machine, write

_LONG = 20_000  # tokens of the documents that only have to end
_SAMPLES = 10_000  # of the bootstrap


def run(
    bundle: Path, out: Path, *, documents: int = 40, min_tokens: int = 1500, summary_tokens: int = 64, threads: int = 0
) -> dict[str, Any]:
    """Write `out/summaries.json` and `.html`. `documents`: at most so many, each of `min_tokens` tokens or more."""
    params = SummariseParams(max_summary_tokens=summary_tokens)
    with Engine.from_bundle(bundle, EngineConfig(threads=threads)) as engine:
        summariser = Summariser(engine, params=params)
        found = [(name, reference, text, len(engine.tokenizer.encode(text))) for name, reference, text in _modules()]
        chosen = [one for one in found if one[3] >= min_tokens][:documents]
        rows = []
        for name, reference, text, tokens in chosen:
            cut = engine.tokenizer.decode(engine.tokenizer.encode(text)[: summariser.params.chunk_tokens])
            line = summariser.line(Record(1, name, name, text))
            answers = {
                "map-reduce": line["summary"],
                "the first chunk alone": summariser.line(Record(1, name, name, cut))["summary"],
                "the first three sentences": " ".join(_sentences(text)[:3]),
            }
            rows.append(
                {
                    "document": name,
                    "tokens": tokens,
                    "chunks": line["chunks"],
                    "rouge_l": {way: _rouge(reference, answer) for way, answer in answers.items()},
                }
            )
        long = _long(summariser, found)
    result = {
        "bundle": bundle.name,
        "summary_tokens": summary_tokens,
        "documents": rows,
        "rouge_l": {way: statistics.mean(row["rouge_l"][way] for row in rows) for way in rows[0]["rouge_l"]},
        "against": _against(rows),
        "long": long,
        "machine": machine(),
    }
    write("summaries", result, _parts(result), out)
    return result


def _long(summariser: Summariser, found: Sequence[tuple[str, str, str, int]]) -> list[dict[str, Any]]:
    """Documents of `_LONG` tokens, made of several: they end, and are no longer than asked."""
    documents, text = [], ""
    for _, _, part, _ in found:
        text += part + "\n\n"
        if len(text) > 4.5 * _LONG:
            documents.append(text)
            text = ""
    tokenizer, rows = summariser.engine.tokenizer, []
    for number, document in enumerate(documents[:3]):
        started = time.perf_counter()
        line = summariser.line(Record(1, str(number), str(number), document))
        rows.append(
            {
                "tokens": len(tokenizer.encode(document)),
                "chunks": line["chunks"],
                "seconds": time.perf_counter() - started,
                "summary_tokens": len(tokenizer.encode(line["summary"])),
            }
        )
    return rows


def _modules() -> list[tuple[str, str, str]]:
    """(name, first paragraph of its docstring, all other docstrings), of the standard library's modules."""
    found = []
    for name, _, tree in standard_library():
        own = ast.get_docstring(tree) or ""
        first, _, rest = own.partition("\n\n")
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        texts = [rest, *(f"{node.name}: {inspect.cleandoc(doc)}" for node in nodes if (doc := ast.get_docstring(node)))]
        if len(first.split()) >= 8:
            found.append((name, " ".join(first.split()), "\n\n".join(text for text in texts if text)))
    return found


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", " ".join(text.split()))


def _rouge(reference: str, answer: str) -> float:
    return float(rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure)


def _against(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean difference of map-reduce to each other way, with the 95 % interval of a paired bootstrap."""
    rng, result = np.random.default_rng(0), {}
    for way in rows[0]["rouge_l"]:
        if way == "map-reduce":
            continue
        gaps = np.array([row["rouge_l"]["map-reduce"] - row["rouge_l"][way] for row in rows])
        means = rng.choice(gaps, (_SAMPLES, len(gaps))).mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        result[way] = {"mean": float(gaps.mean()), "low": float(low), "high": float(high)}
    return result


def _parts(result: dict[str, Any]) -> list[Part]:
    rouge, against = result["rouge_l"], result["against"]
    rows = []
    for way, value in rouge.items():
        gap = against.get(way)
        cell = "" if gap is None else f"{gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})"
        rows.append([way, f"{value:.4f}", cell])
    count = len(result["documents"])
    return [
        Table(
            f"{result['bundle']}, Python {sys.version_info.major}.{sys.version_info.minor}'s docstrings: {count} documents",
            ["", "ROUGE-L", "map-reduce is better by (95 %)"],
            rows,
        ),
        Table(
            f"Long documents, summaries of at most {result['summary_tokens']} tokens",
            ["tokens", "chunks", "seconds", "tokens of the summary"],
            [
                [f"{row['tokens']:,}", str(row["chunks"]), f"{row['seconds']:.1f}", str(row["summary_tokens"])]
                for row in result["long"]
            ],
        ),
        Bars("ROUGE-L", "F1", list(rouge), {"mean": list(rouge.values())}),
    ]
