"""DP-SGD (Abadi et al. 2016) with Opacus: Poisson sampling, per-example clipping, Gaussian noise, the RDP accountant.

The unit of privacy is a training example: its conversation and answer. ε covers the weights. It does not cover the
validation set, by which the best checkpoint is chosen, nor the test set: use public data for them. It does not cover the
counts and the digest of the data either, which are in the run's record; losses on training examples are left out there.

The noise and the sampling come from a secret, drawn for each run. It is kept in the working directory, so that a killed run
can be resumed, and destroyed when the run ends. After that a private run cannot be reproduced exactly.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from torch import Tensor

from ...runtime.errors import ConfigError
from ..data.batches import Item, make_batch, poisson_plan
from ..params import TuneParams
from .loop import SECRET, Loader, TuneModule
from .methods import Learner

ACCOUNTANT = "RDP, Poisson-subsampled Gaussian"
DEFAULT_BATCH = 8  # examples
CHUNK = 4  # examples whose gradients are in memory at the same time
History = Sequence[tuple[float, float, int]]  # (noise multiplier, sampling rate, steps)


@dataclass(frozen=True, slots=True)
class PrivacyBudget:
    """The privacy that a run spends, and the noise for it. Decided before the run starts."""

    epsilon: float  # by the accountant; at most the target
    target: float
    delta: float
    noise_multiplier: float  # standard deviation of the noise, in units of `clip`
    sample_rate: float  # chance that an example is in a batch
    steps: int
    batch_examples: int  # examples in a batch, on average
    clip: float  # largest norm of an example's gradient
    accountant: str = ACCOUNTANT
    covers: str = "the weights, for each training example; not the validation set, which chose the checkpoint"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def epsilon_of(history: History, delta: float) -> float:
    """ε, at `delta`, of mechanisms that run one after the other: their Rényi divergences add up (Mironov 2017)."""
    accountant = RDPAccountant()
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta=delta))


def composed(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The privacy that runs on the same data spend together, from their records (`PrivacyBudget.to_dict`): {"epsilon",
    "delta", "runs", "accountant"}. δ is the smallest of the records'."""
    history = [(r["noise_multiplier"], r["sample_rate"], r["steps"]) for r in records]
    delta = min(float(record["delta"]) for record in records)
    return {
        "epsilon": epsilon_of(history, delta),
        "delta": delta,
        "runs": len(records),
        "accountant": ACCOUNTANT,
    }


def budget(params: TuneParams, num_examples: int) -> PrivacyBudget:
    """The budget whose noise keeps a run within `params.epsilon`.

    Raises `ConfigError` for a δ of 1 / N or more, a mean batch larger than the data, or a clip of 0.
    """
    assert params.epsilon is not None
    delta = params.delta if params.delta is not None else 0.1 / num_examples
    if not 0 < delta < 1 / num_examples:
        raise ConfigError(f"delta must be above 0 and below 1 / N = {1 / num_examples:.3g}, got {delta}")
    batch = params.batch_examples or DEFAULT_BATCH
    if batch > num_examples:
        raise ConfigError(f"batch_examples must be at most the {num_examples} training examples, got {batch}")
    if not params.clip:
        raise ConfigError("DP-SGD clips each example's gradient; clip must be above 0")
    rate = batch / num_examples
    steps = max(1, math.ceil(params.epochs / rate))
    noise = float(
        get_noise_multiplier(
            target_epsilon=params.epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant="rdp"
        )
    )
    spent = epsilon_of([(noise, rate, steps)], delta)
    return PrivacyBudget(spent, params.epsilon, delta, noise, rate, steps, batch, params.clip)


def secret_of(work: Path) -> bytes:
    """The run's secret, 32 bytes. It is drawn at the first call."""
    path = work / SECRET
    if not path.is_file():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(os.urandom(32))
    return path.read_bytes()


class PrivateModule(TuneModule):
    """A `TuneModule` with DP-SGD's step. The batches in `segments` are Poisson samples and may be empty."""

    def __init__(
        self, learner: Learner, segments: list[list[list[int]]], train: Sequence[Item], work: Path, spent: PrivacyBudget
    ) -> None:
        super().__init__(learner, segments, train, work)
        self.automatic_optimization = False
        self.budget = spent
        self.secret = secret_of(work)
        # In a list, so that it is no submodule.
        self._hooks = [GradSampleModule(learner.decoder, loss_reduction="sum", strict=False)]
        self._private: DPOptimizer | None = None

    def train_dataloader(self) -> Loader:
        segment = self.segments[min(self.current_epoch, len(self.segments) - 1)]
        return Loader([tuple(self.train_items[i] for i in batch) for batch in segment])

    def training_step(self, batch: Any, _index: int) -> Any:
        optimiser = self._optimiser()
        torch.manual_seed(random.Random(self.secret + len(self.losses).to_bytes(8)).getrandbits(63))
        chunks = [batch[i : i + CHUNK] for i in range(0, len(batch), CHUNK)]
        total = 0.0
        for number, chunk in enumerate(chunks):
            losses: Tensor = self.learner.example_losses(make_batch(chunk))
            self.check(float(losses.detach().sum()), "loss")
            total += float(losses.detach().sum())
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimiser.signal_skip_step(number < len(chunks) - 1)
            optimiser.step()
            optimiser.zero_grad()
        if not chunks:  # an empty batch has noise too: its emptiness must not show
            for parameter in optimiser.params:
                parameter.grad_sample = torch.zeros(0, *parameter.shape, device=parameter.device)
            optimiser.step()
            optimiser.zero_grad()
        self.losses.append(total / max(1, len(batch)))
        self.lr_schedulers().step()

    def _optimiser(self) -> DPOptimizer:
        if self._private is None:
            self._private = DPOptimizer(
                self.optimizers(use_pl_optimizer=False),
                noise_multiplier=self.budget.noise_multiplier,
                max_grad_norm=self.budget.clip,
                expected_batch_size=self.budget.batch_examples,
            )
        return self._private


def private_segments(spent: PrivacyBudget, num_examples: int, work: Path) -> list[list[int]]:
    """The Poisson batches of a run; the random numbers come from its secret."""
    seed = random.Random(secret_of(work) + b"sampling").getrandbits(63)
    return poisson_plan(num_examples, spent.batch_examples, spent.steps, seed)
