"""The training loop of all methods, on PyTorch Lightning.

The batches are planned before the first step and cut into *segments*; Lightning takes a segment for an epoch. The state is
saved at the end of each segment. A run that was killed resumes after the last complete segment. Random numbers depend only
on the run's seed and the step, so a resumed run ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...runtime.errors import NumericalError
from ..data.batches import Item, TrainBatch, make_batch, plan
from ..params import TuneParams
from .methods import Learner

LAST, BEST, KEY, SECRET = "last.ckpt", "best.safetensors", "key.json", "secret"
SPELLED = "spelled.safetensors"  # what a projector is after its first phase
SEGMENT = 50  # batches between two checkpoints, at most

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Watch:
    """Callbacks, with the batches done and a loss. `validated` may raise an exception to end the run."""

    stepped: Callable[[int, float], None] = lambda _step, _loss: None  # the loss of the batch
    validated: Callable[[int, float], None] = lambda _step, _loss: None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished training. Losses are in nats per token."""

    steps: int  # batches
    best_step: int  # batches before the best validation
    stopped_early: bool
    losses: list[float]  # of each batch, without the L1 term
    validation: list[tuple[int, float]]  # (batches done, loss)


class Loader:
    """The batches in order. It is a class because Lightning takes a list for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class TuneModule(pl.LightningModule):  # type: ignore[misc]
    """A learner as Lightning wants it: batches, losses, optimiser, checkpoints."""

    def __init__(self, learner: Learner, segments: list[list[list[int]]], train: Sequence[Item], work: Path) -> None:
        super().__init__()
        self.learner = learner
        self.params = learner.params
        self.segments = segments
        self.train_items = train
        self.work = work
        self.losses: list[float] = []
        self.history: list[tuple[int, float]] = []
        self.best: tuple[int, float] = (0, math.inf)
        self.stopped = False
        self.strict_loading = False  # a checkpoint holds only the trained weights
        self._sums = (0.0, 0)

    def train_dataloader(self) -> Loader:
        segment = self.segments[min(self.current_epoch, len(self.segments) - 1)]
        return Loader([make_batch([self.train_items[i] for i in batch]) for batch in segment])

    def transfer_batch_to_device(self, batch: Any, _device: torch.device, _index: int) -> Any:
        return batch  # the learner moves what it needs

    def training_step(self, batch: TrainBatch, index: int) -> Tensor:
        torch.manual_seed(
            self.params.seed * 1_000_003 + len(self.losses)
        )  # so that dropout is the same in a resumed run
        loss = self.learner.loss(batch, self.params.label_smoothing)
        self.check(float(loss.detach()), "loss")
        self.losses.append(float(loss.detach()))
        total = loss + self.params.l1 * self.learner.change() if self.params.l1 else loss
        return total * self._weight(index)

    def _weight(self, index: int) -> float:
        """Factor of a batch's loss that makes Lightning's gradient, a sum over the window's batches divided by
        `accumulate`, that of the mean over all tokens of the window. The last window may have fewer batches."""
        accumulate, segment = self.params.accumulate, self.segments[self.current_epoch]
        first = index - index % accumulate
        counts = [
            sum(self.train_items[i].encoded.num_targets for i in batch) for batch in segment[first : first + accumulate]
        ]
        return accumulate * counts[index - first] / sum(counts)

    def on_before_optimizer_step(self, _optimizer: torch.optim.Optimizer) -> None:
        norms = [p.grad.norm() for p in self.learner.trained().values() if p.grad is not None]
        self.check(float(torch.stack(norms).norm()), "gradient")

    def check(self, value: float, what: str) -> None:
        """Raise `NumericalError` unless `value` is finite. Called before a step, so bad weights are never saved."""
        if not math.isfinite(value):
            kept = (
                f"the last good checkpoint is '{self.work / LAST}'"
                if (self.work / LAST).is_file()
                else "none is saved yet"
            )
            raise NumericalError(
                f"the {what} is {value} at batch {len(self.losses)} of {sum(map(len, self.segments))}; {kept}; "
                f"lower learning_rate (now {self.params.learning_rate:g})"
            )

    def validation_step(self, batch: TrainBatch, _index: int) -> None:
        loss = float(self.learner.loss(batch))
        total, count = self._sums
        self._sums = total + loss * batch.num_targets, count + batch.num_targets

    def on_validation_epoch_end(self) -> None:
        total, count = self._sums
        self._sums = (0.0, 0)
        loss = total / count
        self.history.append((len(self.losses), loss))
        self.log("validation_loss", loss)
        if loss < self.best[1]:
            self.best = (len(self.losses), loss)
            save_file(self.learner.state(), self.work / f"{BEST}.new")
            os.replace(self.work / f"{BEST}.new", self.work / BEST)

    def configure_optimizers(self) -> Any:
        params = self.params
        steps = sum(math.ceil(len(segment) / params.accumulate) for segment in self.segments)
        optimiser = torch.optim.AdamW(
            self.learner.trained().values(), lr=params.learning_rate, weight_decay=params.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps, params))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"learner.{self.learner.prefix}.{n}": t for n, t in self.learner.state().items()}
        checkpoint["motet"] = {
            "losses": self.losses,
            "history": [list(entry) for entry in self.history],
            "best": list(self.best),
            "stopped": bool(self.trainer.should_stop),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["motet"]
        self.losses = list(state["losses"])
        self.history = [(int(step), float(loss)) for step, loss in state["history"]]
        self.best = (int(state["best"][0]), float(state["best"][1]))
        self.stopped = bool(state["stopped"])


class _Keep(Callback):  # type: ignore[misc]
    """Calls the watch, and saves the state at the end of each segment. A kill leaves the previous state intact."""

    def __init__(self, module: TuneModule, watch: Watch) -> None:
        self.module = module
        self.watch = watch

    def on_train_batch_end(self, *_: Any) -> None:
        self.watch.stepped(len(self.module.losses), self.module.losses[-1])

    def on_validation_end(self, *_: Any) -> None:
        self.watch.validated(*self.module.history[-1])

    def on_train_epoch_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.module.work / f"{LAST}.new")
        os.replace(self.module.work / f"{LAST}.new", self.module.work / LAST)


def rate(step: int, steps: int, params: TuneParams) -> float:
    """Factor of the learning rate: linear warm-up, then constant, or down to a tenth on a cosine or a line."""
    ramp = max(1, round(params.warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    done = min(1.0, (step - ramp) / max(1, steps - ramp))
    if params.schedule == "constant":
        return 1.0
    return 0.55 + 0.45 * math.cos(math.pi * done) if params.schedule == "cosine" else 1 - 0.9 * done


def cut(batches: list[list[int]], params: TuneParams) -> tuple[list[list[list[int]]], int]:
    """Cut batches into segments: (segments, number of segments between validations)."""
    between = max(1, math.ceil(len(batches) / params.evaluations))  # batches between validations
    pieces = max(1, math.ceil(between / SEGMENT))
    size = math.ceil(between / pieces / params.accumulate) * params.accumulate
    segments = [batches[i : i + size] for i in range(0, len(batches), size)]
    return segments, pieces


def fit(module: TuneModule, validation: Sequence[Item], every: int, watch: Watch, *, automatic: bool = True) -> Outcome:
    """Train, and leave `module.learner` with its best weights. Resumes if `module.work` has a checkpoint.

    `every`: segments between validations. `automatic` false: the module steps the optimiser itself. Raises
    `NumericalError` if a loss or gradient is not finite, and what `watch` raises.
    """
    params = module.params
    lengths = [len(item.encoded.token_ids) for item in validation]
    batches = Loader([make_batch([validation[i] for i in batch]) for batch in plan(lengths, params.batch_tokens, None)])
    callbacks: list[Callback] = [_Keep(module, watch)]
    if params.patience:
        callbacks.insert(0, EarlyStopping("validation_loss", patience=params.patience, check_on_train_epoch_end=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=1,
            max_epochs=len(module.segments),
            precision="bf16-mixed" if params.precision == "bf16" else "32-true",
            accumulate_grad_batches=params.accumulate if automatic else 1,
            gradient_clip_val=params.clip or None if automatic else None,
            check_val_every_n_epoch=every,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
            default_root_dir=module.work,
        )
        last = module.work / LAST
        if last.is_file():
            module.on_load_checkpoint(torch.load(last, weights_only=True))
        if module.segments and not (module.stopped and last.is_file()):
            trainer.fit(module, val_dataloaders=batches, ckpt_path=last if last.is_file() else None, weights_only=True)
        if not module.history or module.history[-1][0] < len(module.losses):
            trainer.validate(module, dataloaders=batches, verbose=False)
    module.learner.restore(load_file(module.work / BEST))
    return Outcome(
        len(module.losses), module.best[0], bool(trainer.should_stop or module.stopped), module.losses, module.history
    )


def open_work(work: Path, key: dict[str, Any]) -> bool:
    """Make a run's working directory. Returns whether it holds the beginning of the run with this `key`: all that the
    run's result depends on. The files of a run with another key are removed, a private run's secret too."""
    text = json.dumps(key, sort_keys=True)
    is_same = (work / KEY).is_file() and (work / KEY).read_text() == text
    if work.exists() and not is_same:
        for file in (LAST, BEST, KEY, SECRET, SPELLED):
            (work / file).unlink(missing_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    (work / KEY).write_text(text)
    return is_same
