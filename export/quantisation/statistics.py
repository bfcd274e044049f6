"""What calibration text says of a model: the moments of each linear layer's inputs, and how much its outputs matter.

One pass forwards over all text gathers the second moments H = E[x xᵀ] of each linear layer's input x. One pass back
over a part of it gathers the mean squares s of the loss's gradient by each output: with targets drawn from the model itself,
a change D of the weights changes the output's distribution by

    KL ≈ ½ Σₙ sₙ (D H Dᵀ)ₙₙ  nats a token

to second order, as if the changes of different outputs and positions were independent (the Fisher information, in Kronecker
factors: Martens and Grosse 2015). Weights are read layer by layer, and what was found is written to a file layer by layer, so
that a model need not fit into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...runtime.checkpoints.decoder import Decoder
from ...runtime.errors import BundleError, ConfigError
from ...runtime.model.config import DecoderConfig
from ...runtime.model.files import check_space
from ...runtime.model.layout import Linear, decoder_layout
from ...runtime.model.stored import read_header, read_tensor
from ..tensor_file import TensorFile

F32 = npt.NDArray[np.float32]

MIN_TOKENS = 256  # fewer say nothing of a weight with hundreds of columns
GRADIENT_TOKENS = 4096  # of the text's first chunks: the pass back
_VERSION = 2  # raised when other numbers are gathered


class Statistics:
    """Read from a file that `gather` wrote. Names are those of the weights: `<linear>.weight`, the head's name."""

    def __init__(self, path: Path) -> None:
        """Raises `BundleError` for a damaged file."""
        self._path = path
        self._file = path.open("rb")
        try:
            self._tensors = read_header(self._file, path)
        except BundleError:
            self._file.close()
            raise

    def moments(self, name: str) -> F32:
        """E[x xᵀ] of the input [columns, columns]; of an expert, over all tokens, also those that do not run it."""
        return self._read(f"{name}.moments")

    def sensitivity(self, name: str) -> F32:
        """Mean square of the loss's gradient by each output [rows]; of an expert, over the tokens that run it."""
        return self._read(f"{name}.sensitivity")

    @property
    def embedding(self) -> tuple[F32, F32]:
        """How often each token is read, as a share of all [vocab], and the mean square of the loss's gradient by each channel
        of the embedding [hidden]."""
        return self._read("embedding.shares"), self._read("embedding.sensitivity")

    @property
    def influence(self) -> F32:
        """1 − the mean cosine of each layer's input and output [layers] (block influence: Men et al. 2024, ShortGPT)."""
        return self._read("influence")

    def rms(self, name: str) -> F32:
        """Root mean square of each input channel [columns]."""
        return np.sqrt(np.diagonal(self.moments(name)))

    def __contains__(self, name: str) -> bool:
        return f"{name}.moments" in self._tensors

    def close(self) -> None:
        self._file.close()

    def _read(self, name: str) -> F32:
        if name not in self._tensors:
            raise BundleError(f"'{self._path}' has no '{name}'; delete the file, and it is made again")
        values: F32 = read_tensor(self._file, self._path, self._tensors[name])
        return values


def check_text(chunks: Sequence[Sequence[int]]) -> None:
    """Raises `ConfigError` if the text is too short to say anything."""
    num_tokens = sum(map(len, chunks))
    if num_tokens < MIN_TOKENS:
        raise ConfigError(
            f"calibration text has at least {MIN_TOKENS} tokens, this one has {num_tokens}; give more text, or round without "
            "calibration (--method round)"
        )


def text_digest(model_digest: str, chunks: Sequence[Sequence[int]], seed: int = 0) -> str:
    """Digest of what `gather` would write: of the model, the text, the seed and the way of gathering."""
    ids = [[int(token) for token in chunk] for chunk in chunks]
    text = json.dumps([_VERSION, GRADIENT_TOKENS, model_digest, ids, seed])
    return hashlib.sha256(text.encode()).hexdigest()


def gather(
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    chunks: Sequence[Sequence[int]],
    path: Path,
    on_layer: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> None:
    """Write the statistics of `chunks` of token ids to the file `path`, as a whole or not at all. `seed`: of the drawn targets.
    `on_layer` is called 2 · num_layers times. Raises `ConfigError` for too little text, and what `check_space` raises."""
    check_text(chunks)
    layout = decoder_layout(config)
    sizes = {f"{linear.name}.weight": linear.columns for linear in layout.linears} | {layout.head: config.hidden_size}
    check_space(
        path, sum(4 * columns * columns for columns in sizes.values()), "the statistics of the calibration text"
    )
    kinds = [f"{name}.{kind}" for name in sizes for kind in ("moments", "sensitivity")]
    for left in path.parent.glob(f"{path.stem}.*.part"):  # of an export that was killed
        if not Path("/proc", left.suffixes[-2].removeprefix(".")).exists():
            left.unlink(missing_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")  # two exports may run at once
    try:
        with TensorFile(part, [*kinds, "embedding.shares", "embedding.sensitivity", "influence"], {}) as file:
            _Pass(config, weights, chunks, file, on_layer, seed).run()
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def channel_rms(
    config: DecoderConfig, weights: Mapping[str, Tensor], chunks: Sequence[Sequence[int]]
) -> dict[str, F32]:
    """Name of a linear layer → root mean square [columns] of its input channels, over all tokens of `chunks`. Only
    layers with a `source`, and of experts only those that some token runs. `weights` are those of one layer at a time."""
    with torch.device("meta"):
        decoder = Decoder(config)
    layers = decoder_layout(config).layers
    sums: dict[str, Tensor] = {}

    def add(name: str, rows: Tensor) -> None:
        squares = rows.double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    def observe(index: int) -> AbstractContextManager[None]:
        return _observed(decoder, [one for one in layers[index].linears if one.source is not None], add)

    decoder.run_streamed(weights, chunks, observe)
    num_tokens = sum(len(chunk) for chunk in chunks)
    return {name: (total / num_tokens).sqrt().float().numpy() for name, total in sums.items()}


@contextmanager
def _observed(decoder: Decoder, linears: Sequence[Linear], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Meanwhile, `add` gets the name of each linear layer that runs and its input [rows, columns]."""

    def observe(linear: Linear) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            add(linear.name, inputs[0].detach().reshape(-1, linear.columns))

        return decoder.get_submodule(linear.parts[0].name).register_forward_pre_hook(hook)

    handles = [observe(linear) for linear in linears]  # the parts of one have the same input
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _or_its_likes(name: str, found: Mapping[str, Tensor], nothing: Tensor) -> Tensor:
    """What was found of a module; of an expert that no token runs, the mean of its layer's others."""
    if name in found:
        return found[name]
    likes = [other for own, other in found.items() if own.rpartition(".")[2] == name.rpartition(".")[2]]
    return torch.stack(likes).mean(0) if likes else nothing


class _Pass:
    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        chunks: Sequence[Sequence[int]],
        file: TensorFile,
        on_layer: Callable[[], None],
        seed: int,
    ) -> None:
        self._seed = seed
        self._config, self._weights, self._chunks, self._file, self._on_layer = config, weights, chunks, file, on_layer
        self._layout = decoder_layout(config)
        self._num_tokens = sum(map(len, chunks))
        with torch.device("meta"):
            self._decoder = Decoder(config).eval().requires_grad_(False)
        self._own = 0  # how many chunks the pass back has
        while self._own < len(chunks) and sum(map(len, chunks[: self._own])) < GRADIENT_TOKENS:
            self._own += 1

    def run(self) -> None:
        inputs, states = self._forward()
        gradients = self._head(states)
        num_tokens = sum(map(len, self._chunks[: self._own]))
        for index in reversed(range(self._config.num_layers)):
            gradients = self._back(index, inputs[index], gradients)
            self._on_layer()
        shares = torch.bincount(torch.tensor([t for c in self._chunks for t in c]), minlength=self._config.vocab_size)
        squares = torch.stack([gradient.square().sum((0, 1)) for gradient in gradients]).sum(0)
        squares *= self._config.embedding_scale**2
        self._file.add("embedding.shares", (shares / self._num_tokens).float().numpy())
        self._file.add("embedding.sensitivity", (squares / num_tokens).numpy())

    def _forward(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Each layer's input of the chunks that the pass back has, and the last states of all chunks."""
        decoder, inputs, influence = self._decoder, [], []
        tables = ("model.embed_tokens", *(("model.embed_positions",) if self._config.positions == "learned" else ()))
        with torch.no_grad():
            with decoder.holding(self._weights, *tables):
                states = [decoder.embed(torch.tensor([list(chunk)])) for chunk in self._chunks]
            for index, layer in enumerate(self._layout.layers):
                inputs.append(states[: self._own])
                cosines = 0.0
                sums: dict[str, Tensor] = {}

                def add(name: str, rows: Tensor, sums: dict[str, Tensor] = sums) -> None:
                    sums[name] = sums[name].addmm_(rows.t(), rows) if name in sums else rows.t() @ rows

                with decoder.holding(self._weights, f"model.layers.{index}"), _observed(decoder, layer.linears, add):
                    for place, state in enumerate(states):
                        states[place] = decoder.run_layers(state, index, index + 1)
                        cosines += float(torch.cosine_similarity(state, states[place], dim=-1).sum())
                for linear in layer.linears:
                    total = _or_its_likes(linear.name, sums, torch.zeros(linear.columns, linear.columns))
                    self._file.add(f"{linear.name}.weight.moments", (total / self._num_tokens).numpy())
                influence.append(1 - cosines / self._num_tokens)
                self._on_layer()
        self._file.add("influence", np.array(influence, np.float32))
        return inputs, states

    def _head(self, states: list[Tensor]) -> list[Tensor]:
        """Statistics of the head, and the gradients of the loss by the last states of the chunks that the pass back has."""
        decoder, name = self._decoder, self._layout.head
        generator = torch.Generator().manual_seed(self._seed)
        total = torch.zeros(self._config.hidden_size, self._config.hidden_size)
        sensitivity = torch.zeros(self._config.vocab_size)
        gradients: list[Tensor] = []
        with decoder.holding(self._weights, "model.norm", name.removesuffix(".weight")):
            for place, state in enumerate(states):
                rows = decoder.norm(state)[0]
                total += rows.t() @ rows
                if place >= self._own:
                    continue
                with torch.enable_grad():
                    state = state.detach().requires_grad_()
                    logits = decoder.head(decoder.norm(state))[0]
                    shares = logits.detach().softmax(-1)
                    drawn = torch.multinomial(shares, 1, generator=generator)[:, 0]
                    loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
                gradients += torch.autograd.grad(loss, state)
                sensitivity += (shares * (1 - shares)).sum(0)
        self._file.add(f"{name}.moments", (total / self._num_tokens).numpy())
        num_tokens = sum(map(len, self._chunks[: self._own]))
        slope = self._config.logit_scale**2  # a soft cap makes it smaller; at most this
        self._file.add(f"{name}.sensitivity", (sensitivity * slope / num_tokens).numpy())
        return gradients

    def _back(self, index: int, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Through layer `index`: from the gradients by its outputs to those by its inputs."""
        layer = self._layout.layers[index]
        names = [part.name for linear in layer.linears for part in linear.parts]
        squares: dict[str, Tensor] = {}
        counts = dict.fromkeys(names, 0)
        outputs: dict[str, Tensor] = {}

        def observe(name: str) -> torch.utils.hooks.RemovableHandle:
            def hook(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
                outputs[name] = output

            return self._decoder.get_submodule(name).register_forward_hook(hook)

        handles = [observe(name) for name in names]
        result = []
        try:
            with self._decoder.holding(self._weights, f"model.layers.{index}"), torch.enable_grad():
                for state, gradient in zip(inputs, gradients, strict=True):
                    state = state.detach().requires_grad_()
                    last = self._decoder.run_layers(state, index, index + 1)
                    own, *found = torch.autograd.grad(last, [state, *outputs.values()], gradient)
                    result.append(own)
                    for name, rows in zip(outputs, found, strict=True):
                        flat = rows.reshape(-1, rows.shape[-1])
                        found_squares = flat.square().sum(0)
                        squares[name] = squares[name] + found_squares if name in squares else found_squares
                        counts[name] += len(flat)
                    outputs.clear()  # experts run for some chunks only
        finally:
            for handle in handles:
                handle.remove()
        squares = {name: total / counts[name] for name, total in squares.items() if counts[name]}
        for linear in layer.linears:
            parts = [_or_its_likes(part.name, squares, torch.zeros(part.rows)) for part in linear.parts]
            self._file.add(f"{linear.name}.weight.sensitivity", torch.cat(parts).numpy())
        return result
