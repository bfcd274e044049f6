"""A GGUF file with other weights: what llama.cpp is given when a fine-tuned model is compared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.checkpoints.gguf_names import LLAMA_MODULES
from ...runtime.model.config import DecoderConfig


def write_merged_gguf(source: Path, weights: Mapping[str, Any], config: DecoderConfig, out: Path) -> Path:
    """Write the metadata of `source` (architecture llama) with `weights` (canonical name → tensor) in float32 to `out`, unless
    it is there: its name must tell the weights."""
    if out.is_file():
        return out
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader, work = GGUFReader(source), out.with_suffix(".new")
    writer = GGUFWriter(str(work), "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        ):
            continue
        kind = field.types[0]
        writer.add_key_value(
            name, field.contents(), kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None
        )
    for tensor in reader.tensors:
        module, _, part = tensor.name.rpartition(".")
        number = re.search(r"(?<=^blk\.)\d+(?=\.)", module)
        pattern = module if number is None else f"blk.{{}}{module[number.end() :]}"
        values = np.array(weights[f"{LLAMA_MODULES[pattern].format(number and number[0])}.{part}"], np.float32)
        if module.endswith((".attn_q", ".attn_k")):  # rows in the order of rotary pairs
            heads = config.num_heads if module.endswith("_q") else config.num_kv_heads
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    work.replace(out)
    return out
