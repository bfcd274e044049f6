"""What `motet export --search` does: the questions, and what it prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .export.base_model import BaseModel
from .export.exploration.answers import Question
from .export.exploration.candidate import Candidate
from .export.exploration.explore import PAGE, Exploration, explore
from .export.quantisation.method import Method, Target
from .finetune.data.dataset import encode_prompt, load_dataset
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
) -> Path:
    """The directory of the bundle that was chosen. `make(path, method=…, target=…)` exports one with a parity report; `settings`:
    what it depends on beside the base. Candidates are printed while they are made."""
    from rich.console import Console

    said = Console(stderr=True)

    def show(one: Candidate) -> None:
        figures = (
            f"{one.bits:.3f} bits a weight, {one.num_bytes / 1e6:.1f} MB, KL {one.kl:.4f}, {one.decode:.1f} tokens/s"
        )
        said.print(f"{one.name}: {figures}", highlight=False)

    wanted = Exploration(
        base.config,
        lambda path, method, target: make(path, method=method, target=target),
        {"model": base.digest, "data": data, **settings},
        60 * minutes,
        method,
        target,
        _questions(data, base),
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


def _questions(data: str, base: BaseModel) -> list[Question]:
    """Of the test split: those whose prompt and answer fit half of the context."""
    most, found = base.config.max_position_embeddings // 2, list[Question]()
    for example in load_dataset(data).splits["test"]:
        prompt = encode_prompt(base.tokenizer, example)
        answer = base.tokenizer.encode(example.completion, add_special_tokens=False)[:_MOST_ANSWERED]
        if prompt and answer and len(prompt) + len(answer) <= most:
            found.append(Question(prompt, answer))
        if len(found) == NUM_QUESTIONS:
            return found
    if not found:
        raise DataError(f"'{data}' has no test example with a prompt and an answer of at most {most} tokens together")
    return found
