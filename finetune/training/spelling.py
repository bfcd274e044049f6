"""A first phase for projectors: their rows learn to spell the answer, before the language model is asked.

Connectionist temporal classification (Graves et al. 2006) finds by itself which row is which token. A row is compared with the
model's own embeddings of tokens, which are frozen: so it points to the embedding of a token that is said or shown. A step needs
no pass of the language model, so it costs a hundredth of one that does. The model still has to learn to read such rows.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...runtime.errors import DataError, NumericalError
from ...runtime.model.layout import EMBEDDING
from ...runtime.text.tokenizer import Tokenizer
from ..data.batches import Item
from .progress import Progress
from .projector import ProjectorLearner

RATE, BATCH, CLIP = 1e-3, 32, 1.0
_WARM_UP = 50  # steps
_CERTAIN = 50.0  # score of a token whose row is its embedding, where the others' are about 0
_DROPPED = 0.2  # share of the values of the features that are left out in training


@dataclass(frozen=True, slots=True)
class Spelled:
    """`features` [rows or places, width] of a sound or an image, what the projector gets, which makes `rows` rows of it;
    `token_ids` of what is said or shown."""

    features: Tensor
    rows: int
    token_ids: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether there are rows enough: one for each token, and one between two that are equal."""
        twice = sum(a == b for a, b in zip(self.token_ids, self.token_ids[1:]))
        return 0 < len(self.token_ids) + twice <= self.rows


class Speller(nn.Module):
    """Scores of the blank and of the tokens that occur, for each row. `embeddings` [vocabulary, hidden] of the model; `used`: ids
    of the tokens that occur."""

    def __init__(self, projector: nn.Module, embeddings: Tensor, used: Sequence[int]) -> None:
        super().__init__()
        self.projector = projector
        self.index = {token_id: i + 1 for i, token_id in enumerate(used)}  # 0 is the blank
        known = embeddings[list(used)].float()
        self.register_buffer("tokens", known * (_CERTAIN / float(known.square().sum(1).mean())))
        self.blank = nn.Parameter(torch.zeros(known.shape[1]))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """[B, rows, width] → [B, rows, 1 + tokens], log-probabilities."""
        rows = self.projector(features)
        tokens: Tensor = self.tokens  # type: ignore[assignment]
        blank = rows @ self.blank + self.bias
        return torch.cat([blank[..., None], rows @ tokens.T], -1).log_softmax(-1)

    def loss(self, batch: Sequence[Spelled]) -> Tensor:
        """Mean over the examples of −log of the probability of all that is spelled, per token, in nats."""
        features = nn.utils.rnn.pad_sequence([one.features.float() for one in batch], batch_first=True)
        if self.training:
            features = F.dropout(features, _DROPPED)
        said = [torch.tensor([self.index[token_id] for token_id in one.token_ids]) for one in batch]
        rows, tokens = (torch.tensor(sizes) for sizes in ([one.rows for one in batch], list(map(len, said))))
        return F.ctc_loss(self(features).transpose(0, 1), torch.cat(said), rows, tokens)

    @torch.no_grad()
    def spelled(self, features: Tensor) -> list[int]:
        """Token ids that the rows of a sound or an image spell, the likeliest of each row."""
        best = self(features[None].float())[0].argmax(-1).tolist()
        names = list(self.index)
        return [names[i - 1] for i, before in zip(best, [0, *best]) if i and i != before]


def spell_answers(
    learner: ProjectorLearner, train: Sequence[Item], tokenizer: Tokenizer, epochs: int, file: Path, progress: Progress
) -> dict[str, Any]:
    """Train each projector in place to spell the answers of the examples that have its medium. `file` keeps the result: the same
    call after a kill takes it. Returns, by medium: examples, those that were left out because their answer has more tokens than
    there are rows or because they have several files, and the mean loss of the last epoch. Raises `DataError` if none is left,
    `NumericalError`."""
    record = file.with_suffix(".json")
    if file.is_file():
        learner.restore(load_file(file))
        known: dict[str, Any] = json.loads(record.read_text())
        return known
    embeddings = learner.base[EMBEDDING].float() * learner.config.embedding_scale
    found: dict[str, Any] = {}
    for medium, projector in learner.projectors.items():
        all_of_it = _examples(projector, train, medium, tokenizer)
        fitting = [one for one in all_of_it if one.fits]
        if not fitting:
            raise DataError(
                f"no example has one {medium} alone and an answer with as few tokens as there are rows of it, so none can be "
                "spelled; leave out spell_epochs, or make more rows (pool, queries)"
            )
        losses: list[float] = []
        steps = epochs * math.ceil(len(fitting) / BATCH)

        def stepped(_step: int, of: int, loss: float, losses: list[float] = losses, medium: str = medium) -> None:
            losses.append(loss)
            progress.advance(f"spelling, {medium} (batches)", 1, of)

        spell(projector, fitting, embeddings, epochs=epochs, seed=learner.params.seed, stepped=stepped)
        last = losses[-(steps // epochs) :]
        having = sum(any(part.medium == medium for part in item.encoded.embedded) for item in train)
        found[medium] = {
            "epochs": epochs,
            "examples": len(fitting),
            "left_out": having - len(fitting),
            "loss": sum(last) / len(last),
        }
    record.write_text(json.dumps(found))
    save_file(learner.state(), file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)
    return found


@torch.no_grad()
def _examples(projector: nn.Module, train: Sequence[Item], medium: str, tokenizer: Tokenizer) -> list[Spelled]:
    """The examples with one file of the medium, and their answers without the special tokens that end them."""
    found = []
    for item in train:
        parts = [part for part in item.encoded.embedded if part.medium == medium]
        if len(parts) != 1:
            continue
        answer = list(item.encoded.token_ids[item.encoded.answer :])
        while answer and not tokenizer.decode(answer[-1:]):
            answer.pop()
        rows = projector(parts[0].features[None].float()).shape[1]
        found.append(Spelled(parts[0].features, rows, tuple(answer)))
    return found


def spell(
    projector: nn.Module,
    examples: Sequence[Spelled],
    embeddings: Tensor,
    *,
    epochs: int,
    seed: int,
    stepped: Callable[[int, int, float], None] = lambda _step, _steps, _loss: None,
) -> Speller:
    """Train a projector in place on examples that `fit`. `stepped(step, steps, loss)` is called after each step. The same seed
    and examples give the same weights. Raises `NumericalError` if a loss is not finite."""
    used = sorted({token_id for one in examples for token_id in one.token_ids})
    speller = Speller(projector, embeddings, used).train()
    optimiser = torch.optim.AdamW([p for p in speller.parameters() if p.requires_grad], lr=RATE)
    batches = [batch for epoch in range(epochs) for batch in _batches(examples, random.Random(f"{seed} {epoch}"))]
    for step, batch in enumerate(batches):
        torch.manual_seed(seed * 1_000_003 + step)
        share = 0.55 + 0.45 * math.cos(math.pi * step / len(batches))
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / _WARM_UP) * share
        loss = speller.loss([examples[i] for i in batch])
        if not math.isfinite(float(loss.detach())):
            raise NumericalError(f"the loss of spelling is {float(loss.detach())} at step {step + 1} of {len(batches)}")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(speller.parameters(), CLIP)
        optimiser.step()
        stepped(step + 1, len(batches), float(loss.detach()))
    return speller.eval()


def _batches(examples: Sequence[Spelled], rng: random.Random) -> list[list[int]]:
    """Of examples of about the same length, in an order that is drawn."""
    order = list(range(len(examples)))
    rng.shuffle(order)
    order.sort(key=lambda i: len(examples[i].features) // 8)  # stable: random within a bucket
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    rng.shuffle(batches)
    return batches
