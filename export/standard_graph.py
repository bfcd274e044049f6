"""One member of a bundle as a standard decoder graph, for other runtimes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..runtime.model.bundle import WEIGHTS, Bundle
from ..runtime.model.config import DecoderConfig
from ..runtime.model.stored import stored_tensors
from .graph import GraphWriter, Slice


def write_standard_graph(bundle: Bundle, member: int, out: Path) -> None:
    """Write a directory with one member of a bundle as a standard decoder graph (input attention_mask, output logits
    of the last position), the weights (copied) and onnxruntime-genai's configuration."""
    out.mkdir(parents=True, exist_ok=True)
    config, name = bundle.config, bundle.members[member]
    for file in ("tokenizer.json", "tokenizer_config.json", WEIGHTS):
        (out / file).unlink(missing_ok=True)
        if (bundle.path / file).is_file():
            # A copy: ONNX Runtime refuses external data behind a symbolic link, and a bundle has no hard links.
            shutil.copyfile(bundle.path / file, out / file)
    tensors = stored_tensors(bundle.path / WEIGHTS)
    writer = GraphWriter(config, tensors, WEIGHTS, name)
    whole = Slice(embedding=True, start=0, stop=config.num_layers, norm=True, head=True)
    writer.write(whole, out / "model.onnx", standard=True)
    (out / "genai_config.json").write_text(json.dumps(_genai_config(config, bundle.eos_token_ids), indent=1))


def _genai_config(config: DecoderConfig, eos: tuple[int, ...]) -> dict[str, Any]:
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    inputs |= {"position_ids": "position_ids"} if config.positions == "learned" else {}
    inputs |= {
        f"past_{kind}_names": f"past_key_values.%d.{part}" for kind, part in (("key", "key"), ("value", "value"))
    }
    outputs = {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": config.head_size,
        "hidden_size": config.hidden_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
    }
    model = {
        "bos_token_id": 0,
        "eos_token_id": list(eos) or [0],
        "pad_token_id": 0,
        "context_length": config.max_position_embeddings,
        "type": "llama",
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    search = {"max_length": config.max_position_embeddings, "do_sample": False, "past_present_share_buffer": True}
    return {"model": model, "search": search}
