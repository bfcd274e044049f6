"""The parity report: every member of a bundle, as it is served, against the same member in fp32."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.api.config import EngineConfig
from ..runtime.backends.onnx.backend import OnnxBackend
from ..runtime.checkpoints.decoder import Decoder
from ..runtime.checkpoints.huggingface import read_config, read_weights
from ..runtime.checkpoints.members.adapter import ADAPTER, merge, read_adapter
from ..runtime.checkpoints.members.tail import read_tail
from ..runtime.model.bundle import WEIGHTS, Bundle
from ..runtime.model.stored import stored_tensors

F32 = npt.NDArray[np.float32]

REPORT = "parity.json"


@dataclass(frozen=True, slots=True)
class MemberParity:
    """A member's agreement with its fp32 self over `num_tokens` predictions on held-out text."""

    name: str
    num_tokens: int
    nll: float  # nats a token, fp32
    nll_change: float  # (served - fp32) / fp32
    kl: float  # mean KL(fp32 || served), nats a token
    top1: float  # share of positions with the same best token


@dataclass(frozen=True, slots=True)
class Parity:
    """A bundle's report. `overhead`: size on disk of weights and graphs / bytes of the tensors that they hold."""

    bits: int
    size_bytes: int
    overhead: float
    members: tuple[MemberParity, ...]

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def measure_parity(
    bundle: Bundle,
    model_dir: Path,
    tails: Mapping[str, Path | None],
    chunks: Sequence[Sequence[int]],
    *,
    threads: int = 0,
    on_chunk: Callable[[], None] = lambda: None,
) -> Parity:
    """Score `chunks` of token ids under each member of `bundle` and its fp32 original; also written to parity.json.

    `tails`: member → directory of its tail or merged adapter, None for the base. `on_chunk` is called after each
    chunk of each member.
    """
    longest = max(len(chunk) for chunk in chunks)
    config = EngineConfig(max_num_seqs=1, max_model_len=longest, threads=threads)
    backend = OnnxBackend(bundle, config)
    base = read_weights(model_dir)
    reports = []
    for index, name in enumerate(bundle.members):
        path = tails.get(name)
        own = {} if path is None else _own_weights(path, base)
        decoder = Decoder.from_weights(read_config(model_dir), {**base, **own}).eval()
        reports.append(_compare(name, decoder, backend, index, chunks, on_chunk))
    size = sum((bundle.path / file).stat().st_size for file in _model_files(bundle))
    held = sum(tensor.length for tensor in stored_tensors(bundle.path / WEIGHTS).values())
    parity = Parity(int(bundle.quantisation["bits"]), size, size / held, tuple(reports))
    (bundle.path / REPORT).write_text(json.dumps(parity.to_dict(), indent=1) + "\n")
    return parity


def _own_weights(path: Path, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if (path / ADAPTER.manifest).is_file():
        return merge(base, read_adapter(path)[1])
    return read_tail(path)[1]


def _model_files(bundle: Bundle) -> list[str]:
    return [WEIGHTS, bundle.graphs.trunk, bundle.graphs.head, *bundle.graphs.tails.values()]


def _compare(
    name: str,
    decoder: Decoder,
    backend: OnnxBackend,
    member: int,
    chunks: Sequence[Sequence[int]],
    on_chunk: Callable[[], None],
) -> MemberParity:
    agreement = Agreement()
    for chunk in chunks:
        agreement.add(chunk, reference_logits(decoder, chunk), backend.score(chunk, member))
        on_chunk()
    return agreement.result(name)


def reference_logits(decoder: Decoder, token_ids: Sequence[int]) -> F32:
    """Logits [S, vocab] of the fp32 model."""
    with torch.no_grad():
        logits: F32 = decoder(torch.tensor([list(token_ids)]))[0].numpy()
    return logits


class Agreement:
    """Sums up how far served logits are from fp32 ones, chunk by chunk."""

    def __init__(self) -> None:
        self._count = self._same = 0
        self._nll = self._served_nll = self._kl = 0.0

    def add(self, token_ids: Sequence[int], reference: F32, served: F32) -> None:
        """One chunk of S tokens, which makes S - 1 predictions; logits [S, vocab]."""
        expected = torch.log_softmax(torch.from_numpy(np.ascontiguousarray(reference[:-1])), -1)
        found = torch.log_softmax(torch.from_numpy(np.ascontiguousarray(served[:-1])), -1)
        targets = torch.tensor(list(token_ids[1:]))[:, None]
        self._count += len(token_ids) - 1
        self._nll -= float(expected.gather(1, targets).sum())
        self._served_nll -= float(found.gather(1, targets).sum())
        self._kl += float((expected.exp() * (expected - found)).sum())
        self._same += int((expected.argmax(-1) == found.argmax(-1)).sum())

    def result(self, name: str) -> MemberParity:
        return MemberParity(
            name,
            self._count,
            self._nll / self._count,
            self._served_nll / self._nll - 1,
            self._kl / self._count,
            self._same / self._count,
        )
