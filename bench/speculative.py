"""`motet bench speculative`: answers with and without drafts, in turns: how fast they are, and whether they are equal.

There are two sets of requests. `extract` asks for a summary that copies the first sentences of a document from the held-out
standard library documentation; an example of a document with its summary comes first. Answers that copy can be drafted, and
the share of an answer that its prompt has (in runs of 4 tokens) is reported. `chat` asks questions without a source, for which
drafts can only cost time.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..finetune.data.dataset import load_dataset
from ..pages import Bars, Table
from ..runtime.api.config import EngineConfig
from ..runtime.api.request import Request
from ..runtime.api.sampling import SamplingParams
from ..runtime.engine.engine import Engine
from ..runtime.model.bundle import Bundle
from ..runtime.text.tokenizer import Tokenizer
from .lib import probes
from .lib.report import machine, write

EXTRACT = "Summarise the following text: copy its first three sentences, word for word.\n\n"
QUESTIONS = (
    "Why is the sky blue?",
    "Give me three ideas for a birthday present for my grandmother.",
    "Explain what a prime number is to a child.",
    "Write a short story about a lighthouse keeper who is afraid of the sea.",
    "How do I cook rice so that it does not stick?",
    "What is the difference between a virus and a bacterium?",
    "Write a polite e-mail that declines an invitation to a wedding.",
    "What should I look at when I buy a used bicycle?",
    "Describe how a steam engine works.",
    "What are good habits for falling asleep early?",
    "Tell me about the history of tea.",
    "How can I become better at chess?",
)
_BREAK = "\n\n"  # between the instruction and the document
_RUN = 4  # this many tokens in a row count as quoted


@dataclass(slots=True)
class Pass:
    """One pass over a set. `seconds` is the time of all answers, `decode_s` that from the first token of each answer."""

    answers: list[tuple[int, ...]]
    seconds: float = 0.0
    decode_s: float = 0.0
    drafted: int = 0
    accepted: int = 0


def run(
    bundle_path: Path,
    out: Path,
    *,
    documents: int = 12,
    source_tokens: int = 256,
    max_tokens: int = 96,
    speculative_tokens: int = 8,
    temperatures: Sequence[float] = (0.0,),
    repeats: int = 3,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure, write `out/speculative.json` and `.html`, print the table and one JSON line. One request at a time."""
    bundle = Bundle.load(bundle_path)
    tokenizer = Tokenizer.from_dir(bundle.path)
    sets = {
        "extract": _extract_prompts(tokenizer, documents, source_tokens),
        "chat": [_chat(tokenizer, question) for question in QUESTIONS[:documents]],
    }
    needed = max(len(prompt) for prompts in sets.values() for prompt in prompts) + max_tokens
    config = EngineConfig(max_num_seqs=1, max_model_len=needed, threads=threads, prefix_cache=False)
    before = probes.measure(config.num_threads)
    with Engine.from_bundle(bundle_path, config, verify=False) as engine:
        rows = [
            _compare(engine, name, prompts, max_tokens, speculative_tokens, temperature, repeats)
            for name, prompts in sets.items()
            for temperature in temperatures
        ]
    result = {
        "bundle": bundle.name,
        "bits": bundle.quantisation["bits"],
        "speculative_tokens": speculative_tokens,
        "max_tokens": max_tokens,
        "repeats": repeats,
        "machine": machine(),
        "limits": before,
        "limits_after": probes.measure(config.num_threads),
        "sets": rows,
    }
    write("speculative", result, [_table(result), *_plots(result)], out)
    return result


def _chat(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """Token ids of a conversation whose turns are the user's, the assistant's, the user's …"""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return tokenizer.encode_chat(messages) if tokenizer.has_chat_template else tokenizer.encode("\n\n".join(texts))


def _extract_prompts(tokenizer: Tokenizer, count: int, source_tokens: int) -> list[list[int]]:
    """Prompts with documents of the test split, cut to `source_tokens`. Shorter documents are left out.

    The first document, with its summary, is the example in every prompt.
    """
    documents: list[str] = []
    for example in load_dataset("stdlib-docs").splits["test"]:
        text = f"{example.completion} {example.messages[-1]['content'].partition(_BREAK)[2]}"
        token_ids = tokenizer.encode(" ".join(text.split()))
        if len(token_ids) >= source_tokens:
            documents.append(tokenizer.decode(token_ids[:source_tokens]))
        if len(documents) > count:
            break
    shown, *others = documents
    summary = " ".join(re.split(r"(?<=\.) (?=[A-Z])", shown)[:3])
    return [_chat(tokenizer, EXTRACT + shown, summary, EXTRACT + document) for document in others]


def _compare(
    engine: Engine,
    name: str,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    speculative_tokens: int,
    temperature: float,
    repeats: int,
) -> dict[str, Any]:
    """Measure without and with drafts, in turns for each request. The first repeat is a warm-up and is not counted."""
    passes: dict[int, list[Pass]] = {0: [], speculative_tokens: []}
    for repeat in range(repeats + 1):
        taken = {drafts: Pass([]) for drafts in passes}
        for index, prompt in enumerate(prompts):
            for drafts in sorted(passes, reverse=bool((index + repeat) % 2)):
                params = SamplingParams(
                    max_tokens=max_tokens, temperature=temperature, seed=index, speculative_tokens=drafts
                )
                _answer(engine, prompt, params, taken[drafts])
        for drafts, found in taken.items():
            passes[drafts] += [found] if repeat else []
    off, on = passes[0], passes[speculative_tokens]
    answers = [one.answers for one in (*off, *on)]
    drafted, accepted = sum(one.drafted for one in on), sum(one.accepted for one in on)
    return {
        "set": name,
        "temperature": temperature,
        "requests": len(prompts),
        "tokens": sum(map(len, off[0].answers)),
        "quoted": _quoted(prompts, off[0].answers),
        "identical": all(found == answers[0] for found in answers),
        "off_tok_s": statistics.median(_rate(one) for one in off),
        "on_tok_s": statistics.median(_rate(one) for one in on),
        "ratio": statistics.median(o.seconds / w.seconds for o, w in zip(off, on, strict=True)),
        "decode_ratio": statistics.median(o.decode_s / w.decode_s for o, w in zip(off, on, strict=True)),
        "accepted": accepted / drafted if drafted else None,
    }


def _answer(engine: Engine, prompt: Sequence[int], params: SamplingParams, taken: Pass) -> None:
    before, start = engine.stats(), time.perf_counter()
    request = Request("bench", (tuple(prompt),), engine.model.default_ensemble, params)
    completion = engine.complete([request])[0][0]
    taken.seconds += time.perf_counter() - start
    after = engine.stats()
    taken.answers.append(tuple(completion.token_ids))
    taken.decode_s += completion.timings.decode_s if completion.timings is not None else 0.0
    taken.drafted += after.drafted_tokens - before.drafted_tokens
    taken.accepted += after.accepted_tokens - before.accepted_tokens


def _rate(taken: Pass) -> float:
    """Tokens per second, without the first token of each answer."""
    return sum(len(answer) - 1 for answer in taken.answers) / taken.decode_s if taken.decode_s else 0.0


def _quoted(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """Share of the answers' runs of `_RUN` tokens that their prompts contain."""
    found = total = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        known = {tuple(prompt[i : i + _RUN]) for i in range(len(prompt) - _RUN + 1)}
        runs = [tuple(answer[i : i + _RUN]) for i in range(len(answer) - _RUN + 1)]
        found += sum(run in known for run in runs)
        total += len(runs)
    return found / total if total else 0.0


def _table(result: dict[str, Any]) -> Table:
    limits = result["limits"]
    title = (
        f"{result['bundle']}, {result['bits']} bits, {limits['threads']} threads, drafts of {result['speculative_tokens']} "
        f"tokens at most; read {limits['read_gb_s']:.0f} GB/s before, {result['limits_after']['read_gb_s']:.0f} after"
    )
    header = ["set", "T", "tokens", "quoted", "off tok/s", "on tok/s", "× decode", "× whole", "accepted", "identical"]
    rows = [
        [
            row["set"],
            f"{row['temperature']:g}",
            f"{row['tokens']:,}",
            f"{row['quoted']:.0%}",
            f"{row['off_tok_s']:,.0f}",
            f"{row['on_tok_s']:,.0f}",
            f"{row['decode_ratio']:.2f}",
            f"{row['ratio']:.2f}",
            "–" if row["accepted"] is None else f"{row['accepted']:.0%}",
            "yes" if row["identical"] else "NO",
        ]
        for row in result["sets"]
    ]
    return Table(title, header, rows)


def _plots(result: dict[str, Any]) -> list[Bars]:
    labels = [f"{row['set']}, T {row['temperature']:g}" for row in result["sets"]]
    values = {name: [row[f"{name}_tok_s"] for row in result["sets"]] for name in ("off", "on")}
    return [Bars("Decode, drafts", "tok/s", labels, values)]
