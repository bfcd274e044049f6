"""An engine with a timer of its steps, and the size of its KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...runtime.api.config import EngineConfig
from ...runtime.api.request import Ensemble, Member, Request
from ...runtime.api.sampling import SamplingParams
from ...runtime.backends.cpu.backend import CpuBackend
from ...runtime.backends.open import open_backend
from ...runtime.engine.engine import Engine
from ...runtime.engine.observer import Observer, StepReport
from ...runtime.engine.open import model_info
from ...runtime.model.bundle import Bundle
from ...runtime.model.layout import Layer, decoder_layout
from ...runtime.schedule.batch import Batch
from ...runtime.text.tokenizer import Tokenizer


class StepTimer(Observer):
    """Records every step of an engine."""

    def __init__(self, *, is_native: bool) -> None:
        self.is_native = is_native  # the steps run on the native kernels
        self.steps: list[StepReport] = []
        self.ready: Callable[[], bool] | None = None  # after the next step the engine waits for it, at most one second

    def on_step(self, step: StepReport) -> None:
        self.steps.append(step)
        until = time.monotonic() + 1.0
        while self.ready is not None and not self.ready() and time.monotonic() < until:
            time.sleep(1e-4)
        self.ready = None


@contextmanager
def timed_engine(path: Path, config: EngineConfig, *, isa: str | None = None) -> Iterator[tuple[Engine, StepTimer]]:
    """An engine on a bundle, and a timer of its steps. `isa`: on the native kernels, with this instruction set."""
    bundle = Bundle.load(path, verify=False)
    backend = CpuBackend(bundle, config, isa=isa) if isa else open_backend(bundle, config)
    timer = StepTimer(is_native=isinstance(backend, CpuBackend))
    with Engine(backend, Tokenizer.from_dir(path), model_info(bundle, config), config, [timer]) as engine:
        yield engine, timer


def random_request(
    bundle: Bundle, index: int, prompt_tokens: int, new_tokens: int, *, members: int = 1, seed: int | None = None
) -> Request:
    """A greedy request for exactly `new_tokens` tokens on random token ids. `seed` (default: `index`) chooses the
    ids; with one seed a shorter prompt is the beginning of a longer one."""
    rng = np.random.default_rng(index if seed is None else seed)
    prompt = tuple(int(t) for t in rng.integers(10, bundle.config.vocab_size - 10, prompt_tokens))
    mix = tuple(Member(name, 1 / members) for name in bundle.members[:members])
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return Request(f"bench-{index}", (prompt,), Ensemble(mix), sampling)


def kv_position_bytes(bundle: Bundle, config: EngineConfig, *, native: bool) -> int:
    """Bytes of the keys and values of one position in one layer. The native int8 cache has a float32 scale per head
    for each key and value; the onnx backend's cache is float32."""
    decoder = bundle.config
    if not native:
        return 2 * decoder.kv_size * 4
    if config.kv_dtype == "bf16":
        return 2 * decoder.kv_size * 2
    return 2 * (decoder.kv_size + 4 * decoder.num_kv_heads)


def cached_layers(bundle: Bundle, members: int = 1) -> list[Layer]:
    """Layers that hold keys and values for a request of the first `members`: the trunk's once, and those of each
    tail."""
    layers = list(decoder_layout(bundle.config).layers)
    return layers[: bundle.split_layer] + layers[bundle.split_layer :] * members


def attended_positions(layers: Sequence[Layer], context: int) -> int:
    """Positions of keys and values that a row at `context` reads in all of `layers`."""
    return sum(context if layer.window is None else min(context, layer.window) for layer in layers)


def run_together(engine: Engine, timer: StepTimer, requests: Sequence[Request]) -> list[StepReport]:
    """Complete requests that have all arrived before the second step. Returns the steps that decoded all of them at
    once."""
    timer.steps.clear()
    timer.ready = lambda: engine.stats().waiting + engine.stats().running >= len(requests)
    engine.complete(requests)
    return [step for step in timer.steps if _decodes(step.batch, len(requests))]


def _decodes(batch: Batch, num_seqs: int) -> bool:
    """Whether the step drew one token for each of `num_seqs` sequences and did nothing else."""
    return len(batch.samples) == num_seqs and batch.num_seqs == batch.num_rows
