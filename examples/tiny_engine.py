"""An inference engine on one page: continuous batching, an ensemble over a shared trunk, sampling. It is here to be read.

    python examples/tiny_engine.py .motet/models/smollm2-135m "The capital of France is" "One, two, three,"
    python examples/tiny_engine.py MODEL_DIR "A prompt" --tail warm=TAIL_DIR --mix base=0.5,warm=0.5

It gives the same tokens as `motet.Engine` on a 32-bit bundle. What the real engine adds is speed and care: it keeps keys and
values (this one computes every sequence again in each step), cuts long prompts into chunks, shares prefixes, quantises,
streams text, and answers over gRPC. The lines below are in the order in which a token passes them.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from motet.kernels.oracle.reference import mix, sample
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import eos_token_ids, read_config, read_weights
from motet.runtime.checkpoints.members.tail import read_tail
from motet.runtime.text.tokenizer import Tokenizer


@dataclass
class Sequence:
    """A prompt, how to sample, and the answer so far. The defaults of sampling are greedy."""

    prompt_ids: list[int]
    max_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    output_ids: list[int] = field(default_factory=list)
    is_finished: bool = False


class TinyEngine:
    """Serves R = Σ mix_i · M_i, where each M_i is the base or the base with last layers of its own (a tail).

    `tails`: member name → directory of its tail, or None for the base itself. `mix`: member name → coefficient, Σ = 1.
    `space`: "logits" or "probs", where the members are mixed. `max_num_seqs`: sequences in one step.
    """

    def __init__(
        self,
        model_dir: Path,
        tails: Mapping[str, Path | None],
        mix: Mapping[str, float],
        *,
        space: str = "logits",
        max_num_seqs: int = 4,
    ) -> None:
        weights = read_weights(model_dir)
        config = read_config(model_dir)
        self.trunk = Decoder.from_weights(config, weights)
        self.split = config.num_layers  # layers below it are the same in all members
        self.members: list[Decoder] = []
        for name in mix:
            path = tails[name]
            manifest, own = read_tail(path) if path is not None else ({"split_layer": self.split}, {})
            self.split = min(self.split, manifest["split_layer"])
            self.members.append(Decoder.from_weights(config, weights | own))  # tensors are shared, not copied
        self.coefficients = list(mix.values())
        self.space = space
        self.max_num_seqs = max_num_seqs
        self.stop_ids = set(eos_token_ids(model_dir, Tokenizer.from_dir(model_dir).eos_token_id))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def run(self, sequences: list[Sequence]) -> None:
        """Finish all `sequences`; their answers are in `output_ids`."""
        self.waiting.extend(sequences)
        while self.waiting or self.running:
            self.step()

    def step(self) -> None:
        """One token for each running sequence. Finished ones leave and waiting ones take their place at once, in the
        middle of the others' answers: this is continuous batching."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            self.running.append(self.waiting.popleft())
        logits = self.forward(self.running)
        for sequence, member_logits in zip(self.running, logits):
            token_id = self.draw(sequence, member_logits)
            sequence.output_ids.append(token_id)
            sequence.is_finished = token_id in self.stop_ids or len(sequence.output_ids) == sequence.max_tokens
        self.running = [sequence for sequence in self.running if not sequence.is_finished]

    @torch.inference_mode()
    def forward(self, batch: list[Sequence]) -> np.ndarray:
        """Next-token logits [batch, members, vocab]. The trunk runs once, the layers above it once for each member."""
        rows = [sequence.prompt_ids + sequence.output_ids for sequence in batch]
        longest = max(map(len, rows))
        token_ids = torch.tensor(
            [row + [0] * (longest - len(row)) for row in rows]
        )  # attention is causal: 0s are unseen
        last = torch.tensor([len(row) - 1 for row in rows])
        hidden = self.trunk.run_layers(self.trunk.embed(token_ids), 0, self.split)  # [batch, longest, hidden]
        logits = []
        for member in self.members:
            tail = member.run_layers(hidden, self.split, member.config.num_layers)
            logits.append(member.head(member.norm(tail[torch.arange(len(rows)), last])))  # [batch, vocab]
        return torch.stack(logits, dim=1).numpy()

    def draw(self, sequence: Sequence, member_logits: np.ndarray) -> int:
        """Mix and sample. The noise depends on (seed, position, token id) only, so neighbours change nothing."""
        mixed = mix(member_logits, self.coefficients, self.space)
        return sample(
            mixed,
            temperature=sequence.temperature,
            top_p=sequence.top_p,
            seed=sequence.seed,
            position=len(sequence.prompt_ids) + len(sequence.output_ids),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="A readable engine over Motet's oracles.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tail", action="append", default=[], metavar="NAME=DIR", help="a member with its own layers")
    parser.add_argument("--mix", default="base=1", metavar="NAME=COEFFICIENT,…", help="'base' is the model itself")
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    tails = {"base": None} | {name: Path(path) for name, _, path in (text.partition("=") for text in options.tail)}
    coefficients = {name: float(value) for name, _, value in (text.partition("=") for text in options.mix.split(","))}
    tokenizer = Tokenizer.from_dir(options.model_dir)
    sequences = [Sequence(tokenizer.encode(prompt), temperature=options.temperature) for prompt in options.prompts]
    TinyEngine(options.model_dir, tails, coefficients).run(sequences)
    for prompt, sequence in zip(options.prompts, sequences):
        print(f"{prompt}|{tokenizer.decode(sequence.output_ids)}")


if __name__ == "__main__":
    main()
