"""What a portable ONNX graph is compared with: the decoder in torch on what a bundle holds, widened to float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from motet.export.quantisation.groups import Quantised, dequantise
from motet.runtime.backends.onnx.sessions import open_session, pool_threads
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.model.bundle import WEIGHTS, Bundle
from motet.runtime.model.layout import EMBEDDING, HEAD, decoder_layout
from motet.runtime.model.stored import own_name, resolve, stored_tensors, stored_weight
from safetensors.numpy import load_file


def bundle_decoder(bundle: Bundle, member: str, dtype=np.float64) -> Decoder:
    """A member of a bundle: its weights as they are stored (rounded to `dtype` once more), its adapter added to them."""
    arrays, places = load_file(bundle.path / WEIGHTS), stored_tensors(bundle.path / WEIGHTS)
    layout = decoder_layout(bundle.config)

    def read(name):
        weight = stored_weight(places, resolve(places, name, member))
        if weight.bits == 32:
            values = arrays[weight.name]
        else:
            parts = [arrays[part] for part in weight.tensors]
            values = dequantise(Quantised(weight.bits, parts[0], parts[1], parts[2] if len(parts) > 2 else None))
        return values.astype(dtype).astype(np.float64)

    weights = {}
    for linear in layout.linears:
        kinds = {"weight": read(f"{linear.name}.weight")}
        a, b = (arrays.get(own_name(member, f"{linear.name}.lora_{half}")) for half in "ab")
        if a is not None:
            kinds["weight"] = kinds["weight"] + b.astype(np.float64) @ a.astype(np.float64)
        if linear.bias:
            kinds["bias"] = arrays[resolve(places, f"{linear.name}.bias", member)]
        rows = np.cumsum([part.rows for part in linear.parts])[:-1]
        for kind, whole in kinds.items():
            for part, values in zip(linear.parts, np.split(whole, rows), strict=True):
                weights[f"{part.name}.{kind}"] = values
    for name in layout.checkpoint_shapes():
        if name not in weights:
            wide = name in (EMBEDDING, HEAD)
            weights[name] = read(name) if wide else arrays[resolve(places, name, member)]
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)).double() for name, values in weights.items()}
    return Decoder.from_weights(bundle.config, tensors)


def torch_logits(decoder: Decoder, token_ids) -> np.ndarray:
    """[S, vocab] of one text."""
    with torch.no_grad():
        return decoder(torch.tensor([list(token_ids)]))[0].numpy()


def exact_session(graph: Path) -> ort.InferenceSession:
    """ONNX Runtime on a graph, with activations in float32: its fused products would round them to 8 bits."""
    if pool_threads() is None:
        open_session(str(graph), 2)
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # there is one pool for the whole process
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


@dataclass
class Texts:
    """Texts of different lengths that run together in a graph, padded on the left."""

    session: ort.InferenceSession
    lengths: list[int] = field(default_factory=list)
    past: dict[str, np.ndarray] = field(default_factory=dict)

    def run(self, rows: list[list[int]]) -> list[np.ndarray]:
        """Logits [new tokens, vocab] of each text's next tokens. After the first run each text has as many."""
        inputs = self.session.get_inputs()
        if not self.past:
            caches = [value for value in inputs if value.name.startswith("past")]
            empty = {v.name: np.zeros((len(rows), v.shape[1], 0, v.shape[3]), np.float32) for v in caches}
            self.past, self.lengths = empty, [0] * len(rows)
        width = max(map(len, rows))
        before = next(iter(self.past.values())).shape[2]
        after = [length + len(row) for length, row in zip(self.lengths, rows, strict=True)]
        ids = np.array([[0] * (width - len(row)) + list(row) for row in rows], np.int64)
        mask = np.array([[0] * (before + width - length) + [1] * length for length in after], np.int64)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -width:]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        names = [value.name for value in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, feeds | self.past), strict=True))
        self.past = {name.replace("present", "past_key_values"): found[name] for name in names[1:]}
        self.lengths = after
        return [logits[width - len(row) :] for logits, row in zip(found["logits"], rows, strict=True)]
