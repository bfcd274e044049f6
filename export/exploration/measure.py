"""How fast a bundle is here, and what it answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...runtime.api.config import EngineConfig
from ...runtime.api.request import Request
from ...runtime.api.sampling import SamplingParams
from ...runtime.engine.observer import Observer, StepReport
from ...runtime.engine.open import open_engine
from ...runtime.text.tokenizer import Tokenizer
from .answers import Answers, Question, ask

_PROMPT, _NEW = 512, 48  # tokens that speeds are measured with


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second of one sequence: prompts that are read, and answers."""

    prefill: float
    decode: float


class _Steps(Observer):
    def __init__(self) -> None:
        self.prompt: list[tuple[int, float]] = []  # rows, seconds
        self.answer: list[float] = []

    def on_step(self, step: StepReport) -> None:
        if step.batch.num_rows > 1:
            self.prompt.append((step.batch.num_rows, step.seconds))
        else:
            self.answer.append(step.seconds)


def measure(bundle: Path, questions: Sequence[Question], config: EngineConfig) -> tuple[Speeds, Answers]:
    """Serve the bundle with its own mix: random tokens for the speeds, and the questions. Raises what `open_engine` raises."""
    tokenizer, steps = Tokenizer.from_dir(bundle), _Steps()
    with open_engine(bundle, replace(config, prefix_cache=False), verify=False, observers=[steps]) as engine:
        answers = ask(engine, tokenizer, questions)
        most, size = engine.model.max_model_len, engine.model.vocab_size
        count, new = min(_PROMPT, most // 2), min(_NEW, most // 4)
        prompt = tuple(int(token) for token in np.random.default_rng(0).integers(0, size, count))
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        rates = []
        for index in range(2):  # the first warms up
            steps.prompt.clear()
            steps.answer.clear()
            engine.complete([Request(f"speed-{index}", (prompt,), engine.model.default_ensemble, sampling)])
            rows, seconds = (sum(values) for values in zip(*steps.prompt, strict=True))
            rates.append(rows / seconds)
    return Speeds(max(rates), 1 / statistics.median(steps.answer)), answers
