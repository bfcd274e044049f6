"""What `motet export --search` does: the questions, and what it prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from . import __version__
from .export.base_model import BaseModel
from .export.exploration.answers import Question
from .export.exploration.candidate import Candidate
from .export.exploration.explore import PAGE, Exploration, explore
from .export.quantisation.method import Method, Target
from .finetune.data.dataset import Dataset, encode_prompt, load_dataset
from .runtime.api.config import EngineConfig
from .runtime.errors import DataError
from .tables import table

NUM_QUESTIONS = 16
_MOST_ANSWERED = 96  # tokens


def search_bundles(
    base: BaseModel,
    make: Callable[..., Path],
    out: Path,
    minutes: float,
    method: Method | None,
    target: Target | None,
    data: str,
    settings: Mapping[str, Any],
    said: Console,
) -> Path:
    """The directory of the bundle that was chosen. `make(path, name=…, method=…, target=…)` exports one with a parity report;
    `settings`: what it depends on beside the base. Candidates are printed on `said` while they are made."""

    def show(one: Candidate) -> None:
        figures = (
            f"{one.bits:.3f} bits a weight, {one.num_bytes / 1e6:.1f} MB, KL {one.kl:.4f}, {one.decode:.1f} tokens/s"
        )
        said.print(f"{one.name}: {figures}", highlight=False)

    dataset = load_dataset(data)
    wanted = Exploration(
        base.config,
        lambda path, method, target: make(path, name=f"{out.name}-{path.name}", method=method, target=target),
        {"model": base.digest, "data": dataset.digest, "version": __version__, **settings},
        60 * minutes,
        method,
        target,
        _questions(dataset, base),
    )
    result = explore(wanted, out, show)
    rows = [
        [one.name, f"{one.bits:.3f}", f"{one.num_bytes / 1e6:.1f}", f"{one.kl:.4f}", f"{one.nll_change:+.2%}"]
        for one in result.kept
    ]
    said.print(
        table(f"worth keeping; chosen: {result.chosen.name}, {result.why}", ["", "bits", "MB", "KL", "ΔNLL"], rows)
    )
    said.print(f"report: {out / PAGE}", highlight=False)
    return result.path


def _questions(data: Dataset, base: BaseModel) -> list[Question]:
    """Of the test split: those whose prompt and answer fit what is served."""
    most, found = EngineConfig().positions(base.config.max_position_embeddings), list[Question]()
    for example in data.splits["test"]:
        prompt = encode_prompt(base.tokenizer, example)
        answer = base.tokenizer.encode(example.completion, add_special_tokens=False)[:_MOST_ANSWERED]
        if prompt and answer and len(prompt) + len(answer) <= most:
            found.append(Question(prompt, answer))
        if len(found) == NUM_QUESTIONS:
            return found
    if not found:
        raise DataError(
            f"'{data.name}' has no test example with a prompt and an answer of at most {most} tokens together"
        )
    return found
