"""An engine whose every step is timed, and what a position of its KV cache weighs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...runtime.api.config import EngineConfig
from ...runtime.api.request import Ensemble, Member, Request, SamplingParams
from ...runtime.backends.base import Backend
from ...runtime.backends.cpu.backend import CpuBackend
from ...runtime.engine.engine import Engine
from ...runtime.model.bundle import Bundle
from ...runtime.model.layout import Layer, decoder_layout
from ...runtime.schedule.batch import Batch, StepOutput


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its batch, wall-clock seconds, and seconds of its native parts (empty where a backend does not say)."""

    batch: Batch
    seconds: float
    parts: dict[str, float]

    def decodes(self, num_seqs: int) -> bool:
        """Whether it drew one token for each of so many sequences, and did nothing else."""
        return len(self.batch.samples) == num_seqs and self.batch.num_seqs == self.batch.num_rows


class TimedBackend:
    """A backend that notes every step."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.steps: list[Step] = []
        self.ready: Callable[[], bool] | None = None  # the next step waits for it, a second at most

    @property
    def num_blocks(self) -> int:
        return self._backend.num_blocks

    @property
    def block_size(self) -> int:
        return self._backend.block_size

    @property
    def can_verify(self) -> bool:
        return self._backend.can_verify

    @property
    def can_sample_prefill(self) -> bool:
        return self._backend.can_sample_prefill

    @property
    def is_native(self) -> bool:
        return isinstance(self._backend, CpuBackend)

    def step(self, batch: Batch) -> StepOutput:
        until = time.monotonic() + 1.0
        while self.ready is not None and not self.ready() and time.monotonic() < until:
            time.sleep(1e-4)
        self.ready = None
        start = time.perf_counter()
        output = self._backend.step(batch)
        seconds = time.perf_counter() - start
        parts = self._backend.seconds() if isinstance(self._backend, CpuBackend) else {}
        self.steps.append(Step(batch, seconds, parts))
        return output

    def close(self) -> None:
        self._backend.close()


@contextmanager
def timed_engine(bundle: Path, config: EngineConfig) -> Iterator[tuple[Engine, TimedBackend]]:
    """An engine on a bundle, and its timed backend."""
    engine = Engine.from_bundle(bundle, config, verify=False)
    timed = TimedBackend(engine._backend)
    engine._backend = timed
    with engine:
        yield engine, timed


def random_request(
    bundle: Bundle, index: int, prompt_tokens: int, new_tokens: int, *, members: int = 1, seed: int | None = None
) -> Request:
    """Greedy, exactly `new_tokens`, on random token ids; `seed` (default: the index) chooses them, and a shorter prompt
    is the beginning of a longer one."""
    rng = np.random.default_rng(index if seed is None else seed)
    prompt = tuple(int(t) for t in rng.integers(10, bundle.config.vocab_size - 10, prompt_tokens))
    mix = tuple(Member(name, 1 / members) for name in bundle.members[:members])
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return Request(f"bench-{index}", (prompt,), Ensemble(mix), sampling)


def kv_position_bytes(bundle: Bundle, config: EngineConfig, *, native: bool) -> int:
    """Bytes of one position's keys and values in one layer. Native int8 has a float32 scale a head for each of them, the
    onnx backend holds float32."""
    decoder = bundle.config
    if not native:
        return 2 * decoder.kv_size * 4
    if config.kv_dtype == "bf16":
        return 2 * decoder.kv_size * 2
    return 2 * (decoder.kv_size + 4 * decoder.num_kv_heads)


def cached_layers(bundle: Bundle, members: int = 1) -> list[Layer]:
    """Layers that have keys and values for a request of the first `members`: the trunk's once and each tail's own; a
    low-rank member has all of them for itself."""
    layers = list(decoder_layout(bundle.config).layers)
    chosen = range(members)
    adapters = sum(member in bundle.adapters for member in chosen)
    others = members - adapters
    split = bundle.split_layer if bundle.graphs.tails else bundle.config.num_layers
    shared = layers[:split] + layers[split:] * others if others else []
    return layers * adapters + shared


def attended_positions(layers: Sequence[Layer], context: int) -> int:
    """Positions of keys and values that a row at `context` reads in all of `layers`."""
    return sum(context if layer.window is None else min(context, layer.window) for layer in layers)


def run_together(engine: Engine, timed: TimedBackend, requests: Sequence[Request]) -> list[Step]:
    """Complete requests that all wait when the first step begins; the steps that decoded all of them at once."""
    timed.steps.clear()
    timed.ready = lambda: engine.stats().waiting + engine.stats().running >= len(requests)
    engine.complete(requests)
    return [step for step in timed.steps if step.decodes(len(requests))]
