"""`Teacher`: the unpruned model, as a pruned one learns from it.

What is kept of it for an example is the output of its last layer, in bfloat16: the trunk cache has it on disk, and the norm and
the head, in float32, give the logits again. They are of the tokens that the pruned model has, and no others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.checkpoints.decoder import Decoder
from ...runtime.checkpoints.huggingface import checkpoint_digest, open_weights, read_config, read_weights
from ...runtime.checkpoints.pruned import origins_of, read_record
from ...runtime.errors import BundleError
from ...runtime.model.layout import EMBEDDING, HEAD
from ..data.encode import Encoded
from .methods import make_trunk
from .trunk_cache import TrunkCache, run_trunk


class Teacher:
    """`pruned`: the model that learns. Raises `NotFoundError` if it was not pruned, `BundleError` if it does not come from the
    model in `model_dir`."""

    def __init__(self, model_dir: Path, pruned: Path, cache: TrunkCache | None) -> None:
        self.name, self.digest, self.cache = model_dir.name, checkpoint_digest(model_dir), cache
        origins = {origin.digest: origin for origin in reversed(origins_of(read_record(pruned)))}
        if self.digest not in origins:
            known = ", ".join(f"'{origin.name}' ({origin.digest[:12]}…)" for origin in origins.values())
            raise BundleError(
                f"'{pruned}' does not come from '{model_dir}' (digest {self.digest[:12]}…), but from {known}; give one of these"
            )
        self._dir, self._config = model_dir, read_config(model_dir)
        size = read_config(pruned).vocab_size
        tokens = origins[self.digest].tokens
        self.tokens = torch.arange(size) if tokens is None else torch.tensor(tokens)
        if len(self.tokens) != size or int(self.tokens.max()) >= self._config.vocab_size:
            raise BundleError(
                f"the record of '{pruned}' does not fit its vocabulary of {size} tokens; prune the model again"
            )
        self._trunk: list[Decoder] = []
        self._head = self._read_head()

    def _read_head(self) -> Decoder:
        """A decoder with norm and head alone, which has the rows of the pruned model's tokens."""
        config = dataclasses.replace(self._config, vocab_size=len(self.tokens))
        with torch.device("meta"):
            decoder = Decoder(config)
        with open_weights(self._dir) as weights:
            own = {name: weights[name] for name in weights if name.startswith("model.norm.")}
            name = EMBEDDING if config.tied_head else HEAD
            own[name] = weights[name][self.tokens]
        decoder.load_state_dict(own, strict=False, assign=True)
        return decoder.eval()

    def _make_trunk(self) -> Decoder:
        """The whole model in bfloat16."""
        if not self._trunk:
            self._trunk.append(make_trunk(self._config, read_weights(self._dir)))
        return self._trunk[0]

    def _own(self, items: Sequence[Encoded]) -> list[Encoded]:
        """The examples in the teacher's token ids."""
        ids = self.tokens.tolist()
        return [dataclasses.replace(item, token_ids=tuple(ids[token] for token in item.token_ids)) for item in items]

    def states(
        self, items: Sequence[Encoded], on_progress: Callable[[int], None] = lambda _count: None
    ) -> list[Tensor]:
        """[S - 1, hidden] bfloat16 of each example: the output of the last layer. With a cache it is a view of a file."""
        if self.cache is not None:
            layers = self._config.num_layers
            found = self.cache.hidden(self._make_trunk, self.digest, layers, self._own(items), on_progress)
            self._trunk.clear()
            return found
        return self.states_now(items)

    def states_now(self, items: Sequence[Encoded]) -> list[Tensor]:
        """The same, computed now."""
        hidden = run_trunk(self._make_trunk(), self._own(items), self._config.num_layers)
        return [hidden[row, : len(item.token_ids) - 1] for row, item in enumerate(items)]

    @torch.no_grad()
    def log_probs(self, states: Tensor) -> Tensor:
        """[T, hidden] → [T, vocab of the pruned model] float32 log-probabilities, given that it is one of these tokens."""
        return self._head.head(self._head.norm(states.float())).log_softmax(-1)
