"""`tune`: train the last n layers and the final norm of a frozen base; the result is a tail.

The trunk is frozen, so its hidden states of an example never change: they are computed once (bfloat16), and every epoch
trains from them. The loss is the mean negative log-likelihood of the answer's tokens (the answer and its end-of-turn);
logits are computed at those positions only.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..runtime.checkpoint import checkpoint_digest, eos_token_ids, read_config, read_weights
from ..runtime.errors import ConfigError, DataError
from ..runtime.tokenizer import Tokenizer
from ..runtime.torch_model import Decoder
from .data import Example, encode_prompt, load_dataset
from .tail import write_tail


@dataclass(frozen=True, slots=True)
class TuneParams:
    """Hyper-parameters. `layers`: how many of the last ones are trained; lengths and batches are in tokens."""

    layers: int = 2
    examples: int = 400
    validation_examples: int = 64
    epochs: int = 2
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    batch_tokens: int = 1024
    max_length: int = 320
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "examples", "validation_examples", "epochs", "batch_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate must be a number above 0, got {self.learning_rate}")


@dataclass(slots=True)
class Item:
    """An example as the tail sees it."""

    hidden: Tensor  # [S, hidden] bfloat16: what the trunk makes of all tokens but the last
    targets: Tensor  # [S] the next token, -1 where it is not part of the answer


def tune(
    model_dir: Path,
    data: str,
    out: Path,
    *,
    name: str | None = None,
    params: TuneParams | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train a tail of the model on `data` (see `load_dataset`), write it to `out` and return its manifest.

    `manifest["metrics"]` has the validation loss before and after (nats a token). Raises `ConfigError`, `DataError`,
    `NotFoundError`, `BundleError`.
    """
    params = params or TuneParams()
    config = read_config(model_dir)
    if params.layers > config.num_layers:
        raise ConfigError(f"layers must be at most {config.num_layers}, the model's, got {params.layers}")
    split = config.num_layers - params.layers
    dataset = load_dataset(data)
    tokenizer = Tokenizer.from_dir(model_dir)
    end = eos_token_ids(model_dir)[:1]
    decoder = Decoder.from_weights(config, read_weights(model_dir))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show_progress, transient=True) as progress:
        sets = {}
        for part, count in (("train", params.examples), ("validation", params.validation_examples)):
            encoded = _encode(tokenizer, dataset.splits[part][: 4 * count], params.max_length, end)[:count]  # type: ignore[index]
            if not encoded:
                raise DataError(f"no {part} example of '{data}' fits max_length {params.max_length}; raise it")
            sets[part] = _run_trunk(decoder, encoded, split, _ticker(progress, f"trunk, {part}", len(encoded)))
        before = evaluate(decoder, sets["validation"], split, params.batch_tokens)
        _train(decoder, sets["train"], split, params, progress)
        after = evaluate(decoder, sets["validation"], split, params.batch_tokens)
    manifest = {
        "name": name or out.name,
        "split_layer": split,
        "base": {"name": model_dir.name, "digest": checkpoint_digest(model_dir)},
        "data": {"name": dataset.name, "digest": dataset.digest, "counts": {k: len(v) for k, v in sets.items()}},
        "hyper_parameters": asdict(params),
        "metrics": {"validation_loss_before": before, "validation_loss_after": after},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    write_tail(out, manifest, tail_weights(decoder, split))
    return manifest


def tail_weights(decoder: Decoder, split: int) -> dict[str, Tensor]:
    """The tensors of layers ≥ split and of the final norm."""
    trained = tuple(f"model.layers.{i}." for i in range(split, decoder.config.num_layers)) + ("model.norm.",)
    return {name: tensor.detach() for name, tensor in decoder.state_dict().items() if name.startswith(trained)}


def _ticker(progress: Progress, title: str, total: int) -> Callable[[], None]:
    task = progress.add_task(title, total=total)
    return lambda: progress.advance(task)


def _encode(
    tokenizer: Tokenizer, examples: Sequence[Example], max_length: int, end: tuple[int, ...]
) -> list[tuple[list[int], int]]:
    """(token ids, where the answer begins) of the examples that fit."""
    encoded = []
    for example in examples:
        prompt = encode_prompt(tokenizer, example)
        answer = tokenizer.encode(example.completion, add_special_tokens=False) + list(end)
        if answer and len(prompt) + len(answer) <= max_length:
            encoded.append((prompt + answer, len(prompt)))
    return encoded


@torch.no_grad()
def _run_trunk(
    decoder: Decoder, encoded: Sequence[tuple[list[int], int]], split: int, tick: Callable[[], None]
) -> list[Item]:
    trunk = Decoder.from_weights(
        decoder.config, {name: tensor.to(torch.bfloat16) for name, tensor in decoder.state_dict().items()}
    )
    items: list[Item | None] = [None] * len(encoded)
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    for start in range(0, len(by_length), 8):
        chosen = by_length[start : start + 8]
        longest = len(encoded[chosen[-1]][0]) - 1
        tokens = torch.zeros(len(chosen), longest, dtype=torch.long)  # padded at the end: causal, so it does not matter
        for row, index in enumerate(chosen):
            tokens[row, : len(encoded[index][0]) - 1] = torch.tensor(encoded[index][0][:-1])
        hidden = trunk.run_layers(trunk.embed(tokens), 0, split)  # [B, S, hidden] bfloat16
        for row, index in enumerate(chosen):
            token_ids, answer = encoded[index]
            targets = torch.tensor(token_ids[1:])
            targets[: answer - 1] = -1
            items[index] = Item(hidden[row, : len(token_ids) - 1].clone(), targets)
            tick()
    return [item for item in items if item is not None]


def _batches(items: Sequence[Item], batch_tokens: int, rng: random.Random | None) -> list[list[Item]]:
    """Items of like length together, up to `batch_tokens` padded tokens; batches in random order if `rng` is given."""
    ordered = list(items)
    if rng is not None:
        rng.shuffle(ordered)
    ordered.sort(key=lambda item: len(item.targets) // 16)  # stable: random within a bucket
    batches: list[list[Item]] = []
    for item in ordered:
        if batches and (len(batches[-1]) + 1) * max(len(item.targets), len(batches[-1][-1].targets)) <= batch_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    if rng is not None:
        rng.shuffle(batches)
    return batches


def _loss(decoder: Decoder, batch: Sequence[Item], split: int) -> tuple[Tensor, int]:
    """(sum of the negative log-likelihoods, number) of the answers' tokens of a batch."""
    longest = max(len(item.targets) for item in batch)
    hidden = torch.stack([F.pad(item.hidden.float(), (0, 0, 0, longest - len(item.hidden))) for item in batch])
    targets = torch.stack([F.pad(item.targets, (0, longest - len(item.targets)), value=-1) for item in batch])
    hidden = decoder.norm(decoder.run_layers(hidden, split, decoder.config.num_layers))
    wanted = targets >= 0
    logits = decoder.head(hidden[wanted])  # [answer tokens, vocab]
    return F.cross_entropy(logits, targets[wanted], reduction="sum"), int(wanted.sum())


@torch.no_grad()
def evaluate(decoder: Decoder, items: Sequence[Item], split: int, batch_tokens: int) -> float:
    """Mean negative log-likelihood of the answers' tokens, nats."""
    sums = [_loss(decoder, batch, split) for batch in _batches(items, batch_tokens, None)]
    return sum(float(total) for total, _ in sums) / sum(count for _, count in sums)


def _train(decoder: Decoder, items: Sequence[Item], split: int, params: TuneParams, progress: Progress) -> None:
    torch.manual_seed(params.seed)
    rng = random.Random(params.seed)
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    trained: list[torch.nn.Parameter] = []
    for module in (*decoder.model.layers[split:], decoder.model.norm):
        for parameter in module.parameters():
            trained.append(parameter.requires_grad_(True))
    epochs = [_batches(items, params.batch_tokens, rng) for _ in range(params.epochs)]
    steps = sum(len(batches) for batches in epochs)
    optimiser = torch.optim.AdamW(trained, lr=params.learning_rate, weight_decay=params.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps, params.warmup))
    task = progress.add_task("training", total=steps)
    for batch in _chain(epochs):
        total, count = _loss(decoder, batch, split)
        loss = total / count
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        progress.update(task, advance=1, description=f"training, loss {loss.item():.3f}")


def _rate(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate: linear warm-up, then a cosine down to a tenth."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - ramp) / max(1, steps - ramp)))


def _chain(epochs: Iterable[list[list[Item]]]) -> Iterable[list[Item]]:
    return (batch for batches in epochs for batch in batches)
