"""Batches of like length: less padding, and the same plan for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encode import Encoded


@dataclass(frozen=True, slots=True)
class Item:
    """An example, with what the trunk makes of it if that was computed before."""

    encoded: Encoded
    hidden: Tensor | None = None  # [S - 1, hidden] bfloat16


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Items padded at the end. A = the most answer tokens of an item."""

    items: tuple[Item, ...]
    positions: Tensor  # [B, A] which position predicts the token; 0 where padded
    targets: Tensor  # [B, A] the token, -1 where padded

    @property
    def num_targets(self) -> int:
        return sum(item.encoded.num_targets for item in self.items)


def make_batch(items: Sequence[Item]) -> TrainBatch:
    width = max(item.encoded.num_targets for item in items)
    positions = torch.zeros(len(items), width, dtype=torch.long)
    targets = torch.full((len(items), width), -1)
    for row, item in enumerate(items):
        answer, count = item.encoded.answer, item.encoded.num_targets
        positions[row, :count] = torch.arange(answer - 1, answer - 1 + count)
        targets[row, :count] = torch.tensor(item.encoded.token_ids[answer:])
    return TrainBatch(tuple(items), positions, targets)


def plan(lengths: Sequence[int], batch_tokens: int, rng: random.Random | None) -> list[list[int]]:
    """Indices of items of like length, up to `batch_tokens` padded tokens a batch, batches in random order if `rng` is
    given. An item longer than that is a batch of its own."""
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
    """The batches of all epochs, one after the other; a function of its arguments alone, so a resumed run goes on."""
    return [batch for epoch in range(epochs) for batch in plan(lengths, batch_tokens, random.Random(f"{seed} {epoch}"))]


def poisson_plan(num_items: int, mean: float, steps: int, seed: int | None) -> list[list[int]]:
    """DP-SGD's sampling: each item is in each batch with probability mean / num_items; a batch may be empty.

    `seed` None: from the system's randomness, which a private run must use (the accountant counts on it).
    """
    rng = random.SystemRandom() if seed is None else random.Random(seed)
    rate = mean / num_items
    return [[i for i in range(num_items) if rng.random() < rate] for _ in range(steps)]
