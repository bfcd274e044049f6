"""Batches of examples of similar length, which need less padding. The same seed gives the same batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.checkpoints.decoder import Decoder
from .encode import EmbeddedRows, Encoded


@dataclass(frozen=True, slots=True)
class Item:
    """An example, with the trunk's output for it if that is cached."""

    encoded: Encoded
    hidden: Tensor | None = None  # [S - 1, hidden] bfloat16, of all S tokens but the last
    # For a student: [K, targets, hidden] final states of an ensemble's members; for a pruned model: [S - 1, hidden] bfloat16
    # of what the last layer of the unpruned one makes
    teacher: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """B items, padded at the end. A is the largest number of tokens in an item that the loss is taken on."""

    items: tuple[Item, ...]
    positions: Tensor  # [B, A] the position that predicts the token; 0 where padded
    targets: Tensor  # [B, A] the token, -1 where padded

    @property
    def num_targets(self) -> int:
        return sum(item.encoded.num_targets for item in self.items)


def embed(
    decoder: Decoder,
    items: Sequence[Encoded],
    length: int | None = None,
    rows_of: Callable[[EmbeddedRows], Tensor] = EmbeddedRows.rows,
) -> Tensor:
    """[B, S, hidden]: what enters the first layer for all tokens but each example's last, padded at the end, to `length` if it
    is given. `rows_of`: the rows [rows, hidden] of embedded ones."""
    tokens = torch.zeros(len(items), length or max(len(item.token_ids) for item in items) - 1, dtype=torch.long)
    for row, item in enumerate(items):
        tokens[row, : len(item.token_ids) - 1] = torch.tensor(item.token_ids[:-1])
    spans = [(row, part.start, rows_of(part)) for row, item in enumerate(items) for part in item.embedded]
    return decoder.embed(tokens.to(decoder.model.embed_tokens.weight.device), spans)


def make_batch(items: Sequence[Item]) -> TrainBatch:
    width = max(item.encoded.num_targets for item in items)
    positions = torch.zeros(len(items), width, dtype=torch.long)
    targets = torch.full((len(items), width), -1)
    for row, item in enumerate(items):
        indices = torch.tensor(item.encoded.targets)
        positions[row, : len(indices)] = indices - 1
        targets[row, : len(indices)] = torch.tensor(item.encoded.token_ids)[indices]
    return TrainBatch(tuple(items), positions, targets)


def plan(lengths: Sequence[int], batch_tokens: int, rng: random.Random | None) -> list[list[int]]:
    """Batches of item indices, of similar length, with at most `batch_tokens` tokens per batch, padding included.

    A longer item is a batch of its own. With `rng`, the batches and the items of similar length are in random order.
    """
    order = list(range(len(lengths)))
    if rng is not None:
        rng.shuffle(order)
    order.sort(key=lambda i: lengths[i] // 16)  # stable: random within a bucket
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    if rng is not None:
        rng.shuffle(batches)
    return batches


def training_plan(lengths: Sequence[int], batch_tokens: int, epochs: int, seed: int) -> list[list[int]]:
    """The batches of all epochs in order. They depend only on the arguments, so a resumed run has the same ones."""
    return [batch for epoch in range(epochs) for batch in plan(lengths, batch_tokens, random.Random(f"{seed} {epoch}"))]


def poisson_plan(num_items: int, mean: float, steps: int, seed: int | None) -> list[list[int]]:
    """Batches by Poisson sampling (DP-SGD): each item is in each batch with probability mean / num_items.

    A batch may be empty. `seed` None uses the system's randomness. The seed of a private run must be secret: the privacy
    accountant assumes that the batches are not known.
    """
    rng = random.SystemRandom() if seed is None else random.Random(seed)
    rate = mean / num_items
    return [[i for i in range(num_items) if rng.random() < rate] for _ in range(steps)]
