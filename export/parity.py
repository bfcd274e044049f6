"""The parity report: every member of a bundle, as it is served, compared with the same member in fp32."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.api.config import EngineConfig
from ..runtime.backends.base import Backend
from ..runtime.backends.open import open_backend
from ..runtime.backends.probe import NUM_TOKENS, MemberProbe, Probe
from ..runtime.checkpoints.decoder import Decoder
from ..runtime.checkpoints.members.adapter import attached
from ..runtime.checkpoints.overlay import Overlay
from ..runtime.errors import BundleError, ConfigError, NotFoundError, UnavailableError
from ..runtime.model.bundle import WEIGHTS, Bundle
from ..runtime.model.config import DecoderConfig
from ..runtime.model.files import read_object
from .members import MemberWeights

F32 = npt.NDArray[np.float32]

REPORT = "parity.json"
_ROWS = 64  # that are compared at once: each has the size of the vocabulary, several times


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Text on which a bundle is measured: chunks of at least two token ids. `config`: how the bundle is served for it.
    `on_chunk` is called after each chunk of each member."""

    chunks: Sequence[Sequence[int]]
    config: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    on_chunk: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class MemberParity:
    """How far a served member agrees with the same member in fp32, over `num_tokens` predictions on held-out text."""

    name: str
    num_tokens: int
    nll: float  # nats per token, fp32
    nll_change: float  # (served - fp32) / fp32
    kl: float  # mean KL(fp32 || served), nats per token
    reverse_kl: float  # mean KL(served || fp32)
    top1: float  # share of positions with the same most probable token


@dataclass(frozen=True, slots=True)
class Parity:
    """A bundle's report. `backend` and `kv_dtype` served the members. `overhead`: bytes on disk of weights and
    graphs, divided by the bytes of the tensors in them."""

    bits: float  # average bits a weight where they differ
    backend: str
    kv_dtype: str
    size_bytes: int
    overhead: float
    members: tuple[MemberParity, ...]

    def write(self, path: Path) -> None:
        """Write the report to a JSON file."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def read_parity(bundle: Path) -> Parity:
    """The report of the bundle in a directory. Raises `NotFoundError` if it was not measured, `BundleError` if the
    report is damaged."""
    path = bundle / REPORT
    if not path.is_file():
        raise NotFoundError(f"the bundle at '{bundle}' was not measured; export it again without --no-parity")
    try:
        values = read_object(path, "export the bundle again")
        return Parity(**{**values, "members": tuple(MemberParity(**member) for member in values["members"])})
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"'{path}' is damaged ({error!r}); export the bundle again") from error


def check_chunks(chunks: Sequence[Sequence[int]], config: DecoderConfig, what: str) -> None:
    """Raises `ConfigError` unless the model can read every chunk: 2 token ids to a whole context of them."""
    for index, chunk in enumerate(chunks):
        if not 2 <= len(chunk) <= config.max_position_embeddings:
            raise ConfigError(
                f"a chunk of {what} text has 2 to {config.max_position_embeddings} token ids, the model's context; chunk "
                f"{index} has {len(chunk)}"
            )
        if not 0 <= min(chunk) <= max(chunk) < config.vocab_size:
            raise ConfigError(
                f"token ids are in 0…{config.vocab_size - 1}, chunk {index} of the {what} text has {min(chunk)}…{max(chunk)}"
            )


def measure_parity(
    bundle: Bundle, base: Mapping[str, torch.Tensor], members: Sequence[MemberWeights], text: HeldOut
) -> tuple[Parity, Probe]:
    """Score `text` under each member of `bundle` on the backend of `text.config`, and under the member in fp32: the
    weights `base` with the member's own. The beginning of the text becomes the bundle's probe. Raises `UnavailableError` if the
    backend cannot serve the bundle here."""
    longest = max(len(chunk) for chunk in text.chunks)
    try:
        backend = open_backend(bundle, dataclasses.replace(text.config, max_num_seqs=1, max_model_len=longest))
    except (ConfigError, UnavailableError) as error:
        raise UnavailableError(
            f"'{bundle.name}' cannot be measured here: {error}; or leave the measurement out with --no-parity"
        ) from error
    try:
        found = [_compare(bundle, base, member, backend, text) for member in members]
        served = backend.name, backend.kv_dtype
    finally:
        backend.close()
    size = sum((bundle.path / file).stat().st_size for file in bundle.model_files)
    held = _held_bytes(bundle.path / WEIGHTS)
    rows = tuple(row for row, _ in found)
    probe = Probe(list(text.chunks[0][:NUM_TOKENS]), {row.name: answers for row, answers in found})
    return Parity(bundle.quantisation["bits"], *served, size, size / held, rows), probe


def _held_bytes(path: Path) -> int:
    """Bytes of a safetensors file's tensors: the file without its header and the 8 bytes of the header's length."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _compare(
    bundle: Bundle, base: Mapping[str, torch.Tensor], member: MemberWeights, backend: Backend, text: HeldOut
) -> tuple[MemberParity, MemberProbe]:
    """The member in fp32 holds the weights of one layer at a time."""
    agreement = Agreement()
    own = {name: torch.from_numpy(weight) for name, weight in member.weights.items()}
    adapter = {name: torch.from_numpy(half) for name, half in member.adapters.items()}
    weights = Overlay(own, base)
    with torch.device("meta"):
        decoder = Decoder(bundle.config).eval()

    @contextmanager
    def adapted(index: int) -> Iterator[None]:
        mine = {name: half for name, half in adapter.items() if name.startswith(f"model.layers.{index}.")}
        with attached(decoder, mine):
            yield

    states = decoder.run_streamed(weights, text.chunks, adapted)
    index = bundle.members.index(member.name)
    head = "model.embed_tokens" if bundle.config.tied_head else "lm_head"
    with torch.no_grad(), decoder.holding(weights, "model.norm", head):
        for place, chunk in enumerate(text.chunks):
            reference = decoder.head(decoder.norm(states[place])).numpy()
            states[place] = torch.empty(0)
            served = backend.score(chunk, index)
            agreement.add(chunk, reference, served)
            if place == 0:
                probe = MemberProbe.measured(reference[:NUM_TOKENS], served[:NUM_TOKENS])
            text.on_chunk()
    found = agreement.result(member.name)
    if not np.isfinite([found.nll, found.nll_change, found.kl, found.reverse_kl, probe.max_kl]).all():
        raise UnavailableError(
            f"the {backend.name} backend gives logits of member {member.name} that are no numbers; export with more bits, or "
            "look at the checkpoint"
        )
    return found, probe


def reference_logits(decoder: Decoder, token_ids: Sequence[int]) -> F32:
    """Logits [S, vocab] of the fp32 model."""
    with torch.no_grad():
        logits: F32 = decoder(torch.tensor([list(token_ids)]))[0].numpy()
    return logits


class Agreement:
    """Accumulates how far served logits are from fp32 ones, chunk by chunk."""

    def __init__(self) -> None:
        self._count = self._same = 0
        self._nll = self._served_nll = self._kl = self._reverse_kl = 0.0

    def add(self, token_ids: Sequence[int], reference: F32, served: F32) -> None:
        """Add a chunk of S tokens, which makes S - 1 predictions; both logits are [S, vocab]."""
        for first in range(0, len(token_ids) - 1, _ROWS):
            rows = slice(first, min(first + _ROWS, len(token_ids) - 1))
            self._add(token_ids[rows.start + 1 : rows.stop + 1], reference[rows], served[rows])

    def _add(self, target_ids: Sequence[int], reference: F32, served: F32) -> None:
        expected = torch.log_softmax(torch.from_numpy(np.ascontiguousarray(reference)), -1)
        found = torch.log_softmax(torch.from_numpy(np.ascontiguousarray(served)), -1)
        targets = torch.tensor(list(target_ids))[:, None]
        self._count += len(target_ids)
        self._nll -= float(expected.gather(1, targets).sum())
        self._served_nll -= float(found.gather(1, targets).sum())
        self._kl += float((expected.exp() * (expected - found)).sum())
        self._reverse_kl += float((found.exp() * (found - expected)).sum())
        self._same += int((expected.argmax(-1) == found.argmax(-1)).sum())

    def result(self, name: str) -> MemberParity:
        """The means over all predictions so far."""
        return MemberParity(
            name,
            self._count,
            self._nll / self._count,
            self._served_nll / self._nll - 1,
            self._kl / self._count,
            self._reverse_kl / self._count,
            self._same / self._count,
        )
