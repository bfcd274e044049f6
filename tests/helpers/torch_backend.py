"""The torch backend over small bundles: its options, an engine with it, and what it answers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member, Request, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.backends.torch.backend import TorchBackend
from motet.runtime.backends.torch.options import TorchOptions
from motet.runtime.checkpoints.huggingface import checkpoint_digest, read_weights
from motet.runtime.checkpoints.members.tail import write_tail
from motet.runtime.engine.engine import Engine
from motet.runtime.engine.open import model_info
from motet.runtime.model.bundle import Bundle
from motet.runtime.text.tokenizer import Tokenizer

from helpers.models import make_adapter

MIX = {"a": 0.5, "b": 0.3, "c": 0.2}
PROMPTS = [(5, 9, 200, 31, 7), (100, 3), tuple(range(40, 61))]


def options(kernels="eager", **changes):
    """On a CPU whatever the machine: GPU variants run where `triton_options` says."""
    values = {"device": torch.device("cpu"), "dtype": torch.float32, "keep_quantised": True, "graphs": False} | changes
    return TorchOptions(kernels=kernels, **values)


def triton_options(**changes):
    """Compiled on a GPU, interpreted elsewhere; float32 on both, so that tokens can be compared."""
    pytest.importorskip("triton", reason="triton is not installed")
    from motet.bench.gpu.problems import DEVICE

    return options("triton", device=torch.device(DEVICE), **changes)


def config(**changes):
    return EngineConfig(**{"backend": "torch", "max_num_seqs": 6, "max_model_len": 64, "threads": 1} | changes)


def engine(path, how, *, backend_type=TorchBackend, **changes):
    """An engine on a bundle with a `TorchBackend` of these options."""
    bundle, settings = Bundle.load(path), config(**changes)
    backend = backend_type(bundle, settings, how)
    return Engine(backend, Tokenizer.from_dir(path), model_info(bundle, settings), settings)


def ask(prompts, ensembles, tokens, **params):
    values = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "logprobs": 2, "seed": 3} | params
    return [
        Request(str(i), prompt if isinstance(prompt[0], tuple) else (prompt,), ensemble, SamplingParams(**values))
        for i, (prompt, ensemble) in enumerate(zip(prompts, ensembles))
    ]


def run(path, how, requests, **changes):
    """(token ids, log-probabilities) of each request."""
    with engine(path, how, **changes) as running:
        return [(c[0].token_ids, np.array(c[0].logprobs)) for c in running.complete(requests)]


def ensemble(space=Space.LOGITS, **mix):
    return Ensemble(tuple(Member(name, value) for name, value in mix.items()), space)


def assert_same(found, expected, atol=1e-4):
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens == wanted
        assert logprobs == pytest.approx(wanted_logprobs, abs=atol)


def complete_with(path, spoil, requests):
    """Outputs by request id when `spoil(backend, batch)` sees every batch before the backend does."""

    class SpoiledBackend(TorchBackend):
        def step(self, batch):
            spoil(self, batch)
            return super().step(batch)

    with engine(path, options(), backend_type=SpoiledBackend, prefix_cache=False) as running:
        ends, done = {}, threading.Semaphore(0)

        def on_output(output):
            tokens, _ = ends.get(output.request_id, ([], None))
            ends[output.request_id] = (tokens + output.token_ids, output.error)
            if output.finish_reason is not None:
                done.release()

        with running._inbox._changed:
            for request in requests:
                running.submit(request, on_output)
        assert all(done.acquire(timeout=60) for _ in requests)
        return ends


def write_bundles(root, model_dir):
    """Three tails of one layer over a tiny model: in 32, 8 and 4 bits; and a base with two low-rank members."""
    weights, digest = read_weights(model_dir), checkpoint_digest(model_dir)
    tails = {}
    for seed, name in enumerate(MIX):
        generator = torch.Generator().manual_seed(seed)
        own = {
            key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in weights.items()
            if key.startswith(("model.layers.3.", "model.norm."))
        }
        tails[name] = root / name
        write_tail(tails[name], {"name": name, "split_layer": 3, "base": {"name": "x", "digest": digest}}, own)
    for bits in (32, 8, 4):
        export_bundle(model_dir, root / f"tails-{bits}", tails=tails, mix=MIX, bits=bits)
    for name, path in tails.items():
        export_bundle(model_dir, root / f"only-{name}", tails={name: path}, bits=32)
    export_bundle(model_dir, root / "base", bits=32)
    loras = {
        "d": make_adapter(model_dir, root / "d", 1, rank=3),
        "e": make_adapter(model_dir, root / "e", 2, ("q_proj", "o_proj"), 5),
    }
    for bits in (32, 8):
        export_bundle(model_dir, root / f"adapters-{bits}", tails={"base": None}, loras=loras, bits=bits)
    return root
