"""`tune`: train a tail or an adapter of a frozen base on a data set. The loop is in `loop`, the methods in `methods`.

A `Workbench` holds what all runs on one model and data set share: the base's weights, the data, the trunk cache.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...runtime.checkpoints.encoders import encoder_pages, read_encoders
from ...runtime.checkpoints.encoders.page import EncoderPage
from ...runtime.checkpoints.huggingface import checkpoint_digest, eos_token_ids, read_config, read_weights
from ...runtime.checkpoints.members.registry import FORMATS
from ...runtime.errors import DataError
from ...runtime.text.tokenizer import Tokenizer
from ..data.batches import Item, make_batch, plan, training_plan
from ..data.dataset import load_dataset
from ..data.encode import DataReport, Encoded, encode_parts, encoded_digest
from ..data.example import Split
from ..data.features import MediaFeatures
from ..params import NearDuplicates, TuneParams
from .loop import KEY, Outcome, TuneModule, Watch, cut, fit, open_work
from .methods import Learner, check_targets, make_trunk
from .progress import Progress
from .provenance import CARD, chosen_by, environment, model_card
from .trunk_cache import TrunkCache

__all__ = ["TuneParams", "Workbench", "tune"]


@dataclass(frozen=True, slots=True)
class RunData:
    """The items of a run by split, and the report on them."""

    parts: dict[Split, list[Item]]
    report: DataReport


class Workbench:
    """A base model and a data set. If `cache` is None, the trunk is run anew for every batch. `pages`: encoders by medium;
    default: the model's own."""

    def __init__(
        self,
        model_dir: Path,
        data: str,
        cache: TrunkCache | None,
        near_duplicates: NearDuplicates = NearDuplicates.DROP,
        pages: Mapping[str, EncoderPage] | None = None,
    ) -> None:
        self.model_dir = model_dir
        self.data = data
        self.cache = cache
        self.config = read_config(model_dir)
        self.digest = checkpoint_digest(model_dir)
        self.dataset = load_dataset(data, near_duplicates)
        known = read_encoders(model_dir) if pages is None else {medium: page.encoder for medium, page in pages.items()}
        control = [token for encoder in known.values() for token in encoder.control_tokens]
        self.tokenizer = Tokenizer.from_dir(model_dir, control)  # as a server has it
        self.tokenizer.check_ids(self.config.vocab_size)
        self.media: MediaFeatures | None = None
        if known and any(example.media for part in self.dataset.splits.values() for example in part):
            self.media = MediaFeatures(
                encoder_pages(model_dir) if pages is None else pages, None if cache is None else cache.features
            )
        self._base: dict[str, Tensor] = {}

    @property
    def base(self) -> dict[str, Tensor]:
        """The base's weights in float32. They are read once; a run copies the tensors that it changes."""
        if not self._base:
            self._base = read_weights(self.model_dir)
        return self._base

    def encode(
        self,
        params: TuneParams,
        counts: dict[Split, int],
        on_progress: Callable[[str, int, int], None] = lambda _what, _count, _total: None,
    ) -> tuple[dict[Split, list[Encoded]], DataReport]:
        """The first examples of each split that fit, encoded, and the report on them. `on_progress`: see `load`. Raises
        `DataError`."""
        params = params.fitted(self.config.max_position_embeddings)
        end = eos_token_ids(self.model_dir, self.tokenizer.eos_token_id)[:1]
        try:
            return encode_parts(self.tokenizer, self.dataset, counts, params, end, self.media, on_progress)
        finally:
            if self.media is not None:
                self.media.close()

    def load(
        self,
        params: TuneParams,
        counts: dict[Split, int],
        on_progress: Callable[[str, int, int], None] = lambda _what, _count, _total: None,
    ) -> RunData:
        """Encode examples, with the trunk's hidden states if there is a cache and a trunk.

        `on_progress(what, items more, items in all)` is called as media and hidden states are computed. Raises `DataError`,
        and what the cache raises.
        """
        encoded, report = self.encode(params, counts, on_progress)
        split = self.config.num_layers - params.num_layers(self.config.num_layers)
        parts = {part: self._items(part, items, split, on_progress) for part, items in encoded.items()}
        return RunData(parts, report)

    def _items(
        self, part: str, encoded: list[Encoded], split: int, on_progress: Callable[[str, int, int], None]
    ) -> list[Item]:
        if self.cache is None or split == 0:
            return [Item(item) for item in encoded]

        def trunk() -> Any:
            return make_trunk(self.config, self.base)

        def on_items(count: int) -> None:
            on_progress(f"trunk, {part}", count, len(encoded))

        hidden = self.cache.hidden(trunk, self.digest, split, encoded, on_items)
        return [Item(item, rows) for item, rows in zip(encoded, hidden)]


def tune(
    model_dir: Path,
    data: str,
    out: Path,
    *,
    name: str | None = None,
    params: TuneParams | None = None,
    cache: TrunkCache | None = None,
    use_cache: bool = True,
    near_duplicates: NearDuplicates = NearDuplicates.DROP,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train on `data` (see `load_dataset`), write a tail or an adapter to `out`, and return its manifest.

    The same call resumes a run that was killed. `manifest["metrics"]` has the validation loss before and after, in nats per
    token. Raises `ConfigError`, `DataError`, `NotFoundError`, `BundleError`, `NumericalError` (a loss or gradient is not
    finite), `UnavailableError` (a full disk), `MissingPackageError`.
    """
    params, config = params or TuneParams(), read_config(model_dir)
    params.check_makes_member()
    params.num_layers(config.num_layers)  # fail early: check before loading weights
    params.fitted(config.max_position_embeddings)
    check_targets(config, params)
    bench = Workbench(model_dir, data, (cache or TrunkCache()) if use_cache else None, near_duplicates)
    with Progress(show_progress) as progress:
        note_duplicates(bench, progress)
        return run(bench, out, params, name=name or out.name, progress=progress)


def note_duplicates(bench: Workbench, progress: Progress) -> None:
    """Say how many near-duplicates the data set has, and what is done with them."""
    if bench.dataset.num_duplicates:
        done = "kept" if bench.dataset.near_duplicates is NearDuplicates.KEEP else "left out"
        progress.note(
            f"{bench.dataset.num_duplicates} examples nearly repeat a held-out one and are {done} (near_duplicates "
            f"{bench.dataset.near_duplicates})"
        )


def run(
    bench: Workbench,
    out: Path,
    params: TuneParams,
    *,
    name: str,
    progress: Progress | None = None,
    watch: Watch | None = None,
    loaded: RunData | None = None,
    make_learner: Callable[..., Learner] = Learner,
    key: Mapping[str, Any] | None = None,
    finish: Callable[[Learner], dict[str, Any]] = lambda _learner: {},
) -> dict[str, Any]:
    """One run on a workbench: see `tune`. `loaded`: data that `bench.load` returned; the run draws its bag from it.

    `make_learner`: called with what `Learner` takes. `key`: what the result depends on besides parameters, base and
    data. `finish`: called with the trained learner; it returns more of the manifest.
    """
    progress = progress or Progress(False)
    params = params.fitted(bench.config.max_position_embeddings)
    counts: dict[Split, int] = {"train": params.examples, "validation": params.validation_examples}
    loaded = loaded or bench.load(params, counts, progress.advance)
    train, validation = bag_of(loaded.parts["train"], params), loaded.parts["validation"]
    work = work_dir(out)
    if params.kind in FORMATS:
        FORMATS[params.kind].check_replaceable(out)
    all_that_counts = {
        **(key or {}),
        "params": params.to_dict(),
        "base": bench.digest,
        "encoded": loaded.report.encoded,  # changes with the data, its split, the tokenizer and the chat template
        "cached": bench.cache is not None,
    }
    had_files, is_same = (work / KEY).is_file(), open_work(work, all_that_counts)
    if had_files and not is_same:
        progress.note(f"'{work}' held an unfinished run with other settings, model or data: starting anew")

    learner = make_learner(bench.config, bench.base, params)
    module, every, privacy = _module(learner, params, train, work)
    batches = [batch for segment in module.segments for batch in segment]
    shown = progress.training(name, [sum(len(train[i].encoded.token_ids) for i in batch) for batch in batches])
    before = evaluate(learner, validation, params)
    outcome = fit(module, validation, every, _both(shown, watch), automatic=privacy is None)
    metrics = _metrics(before, evaluate(learner, validation, params), outcome)
    if privacy is None:  # DP-SGD does not cover losses on training examples
        trained = evaluate(learner, train[: len(validation)], params)
        metrics |= {"train_loss_after": trained, "gap": metrics["validation_loss_after"] - trained}
        metrics["loss_curve"] = outcome.losses
    manifest = {
        "name": name,
        "base": {"name": bench.model_dir.name, "digest": bench.digest},
        "data": {**loaded.report.to_dict(), "spec": bench.data, "trained_on": len(train)},
        "hyper_parameters": params.to_dict(),
        "metrics": metrics,
        "cached": bench.cache is not None,
        "chosen_by": chosen_by(bench.dataset, len(validation), encoded_digest([item.encoded for item in validation])),
        "environment": environment(),
        "privacy": privacy,
        **finish(learner),
    }
    learner.write(out, manifest, {CARD: model_card(manifest)})
    shutil.rmtree(work)
    return manifest


def work_dir(out: Path) -> Path:
    """Where the run that will write `out` keeps its state."""
    return out.parent / f".{out.name}.run"


def _both(first: Watch, second: Watch | None) -> Watch:
    """A watch that calls two."""
    if second is None:
        return first

    def stepped(step: int, loss: float) -> None:
        first.stepped(step, loss)
        second.stepped(step, loss)

    def validated(step: int, loss: float) -> None:
        first.validated(step, loss)
        second.validated(step, loss)

    return Watch(stepped, validated)


def bag_of(items: list[Item], params: TuneParams) -> list[Item]:
    """The run's share of the training examples, drawn by its seed. Raises `DataError` if it is less than 2 examples."""
    count = _bag_size(params, len(items))
    if count < 2:
        raise DataError(f"a run needs at least 2 training examples, it has {count}; give more data or a larger bag")
    if count == len(items):
        return items
    chosen = sorted(random.Random(f"bag {params.seed}").sample(range(len(items)), count))
    return [items[i] for i in chosen]


def _bag_size(params: TuneParams, num_examples: int) -> int:
    return round(params.bag * num_examples)


def privacy_record(params: TuneParams, num_examples: int) -> dict[str, Any] | None:
    """What a private run spends that draws its bag from `num_examples` training examples; None if it is not private.
    Raises as `privacy.budget`."""
    if params.epsilon is None:
        return None
    from .privacy import budget

    return budget(params, _bag_size(params, num_examples)).to_dict()


def _module(
    learner: Learner, params: TuneParams, train: list[Item], work: Path
) -> tuple[TuneModule, int, dict[str, Any] | None]:
    """(module, segments between validations, the privacy budget or None)."""
    if params.epsilon is None:
        lengths = [len(item.encoded.token_ids) for item in train]
        segments, every = cut(training_plan(lengths, params.batch_tokens, params.epochs, params.seed), params)
        return TuneModule(learner, segments, train, work), every, None
    from .privacy import PrivateModule, budget, private_segments

    spent = budget(params, len(train))
    segments, every = cut(private_segments(spent, len(train), work), params)
    return PrivateModule(learner, segments, train, work, spent), every, spent.to_dict()


@torch.no_grad()
def token_losses(learner: Learner, items: list[Item]) -> npt.NDArray[np.float32]:
    """[T] negative log-likelihood of each answer token in nats, in the items' order, without dropout."""
    learner.eval()
    losses = []
    for item in items:
        logits = learner.decoder.head(learner.states_of(item)).float()
        targets = torch.tensor([item.encoded.token_ids[index] for index in item.encoded.targets])
        losses.append(torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none").cpu())
    learner.train()
    return np.asarray(torch.cat(losses).numpy())


@torch.no_grad()
def evaluate(learner: Learner, items: list[Item], params: TuneParams) -> float:
    """Mean negative log-likelihood of the answer tokens, nats per token, without dropout."""
    learner.eval()
    total, count = 0.0, 0
    for chosen in plan([len(item.encoded.token_ids) for item in items], params.batch_tokens, None):
        batch = make_batch([items[i] for i in chosen])
        total += float(learner.loss(batch)) * batch.num_targets
        count += batch.num_targets
    learner.train()
    return total / count


def _metrics(before: float, after: float, outcome: Outcome) -> dict[str, Any]:
    return {
        "validation_loss_before": before,
        "validation_loss_after": after,
        "best_step": outcome.best_step,
        "steps": outcome.steps,
        "stopped_early": outcome.stopped_early,
        "validation_curve": [list(entry) for entry in outcome.validation],
    }
