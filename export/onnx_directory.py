"""One member of a bundle as an ONNX decoder for other runtimes: a directory with the graph, its tensors and what they read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from ..runtime.errors import BundleError, ConfigError, UnsupportedModelError
from ..runtime.model.bundle import WEIGHTS, Bundle
from ..runtime.model.config import DecoderConfig
from ..runtime.model.files import check_replaceable, new_directory, read_object
from ..runtime.model.stored import stored_tensors
from .data_file import DataFile
from .flavours import Flavour, WeightForm
from .graph import GraphWriter, Slice, check_graphs
from .graph_sizes import CONFIG, CONTEXT_NAMES, GENAI
from .portable_graph import OPSETS, PortableWriter, check_portable

GRAPH, DATA, RECORD = "model.onnx", "model.onnx_data", "motet-onnx.json"
DEFAULT_OPSET = 21

_WHAT = "an ONNX decoder that Motet wrote"
_GENERATION = "generation_config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Settings of config.json that are of the checkpoint and not of the graph: how its weights were stored, and code beside it.
_OF_THE_CHECKPOINT = ("quantization_config", "compression_config", "auto_map")


def write_onnx(
    bundle: Bundle,
    out: Path,
    member: str | None = None,
    *,
    flavour: Flavour = Flavour.PORTABLE,
    opset: int | None = None,
    form: WeightForm | None = None,
) -> Path:
    """Write one member of a bundle to the directory `out`, which is replaced as a whole: the graph `model.onnx`, its tensors in
    `model.onnx_data`, the tokenizer, and the configuration that the flavour's runtimes read (`config.json` and
    `generation_config.json`, or `genai_config.json`). Adapters stay low-rank products beside the weights.

    `member`: its name; None: the only one. `opset` (default 21) and `form` of the weights (default: the bundle's bits): of the
    portable flavour. `config.json` is the model's own, with the context that the graph has, and without settings of how its
    checkpoint was stored.

    Raises `ConfigError` for a member that is not there, an option that the flavour does not have, a directory of something else;
    `UnsupportedModelError` for a model that the graph cannot compute, or a member that is the bundle's whole mix at a
    temperature, which a graph of logits does not have; `BundleError` for a bundle that is damaged.
    """
    check_replaceable(out, RECORD, _WHAT)
    if bundle.encoders:
        raise UnsupportedModelError(
            f"'{bundle.name}' has an encoder of {' and '.join(bundle.encoders)}, which this directory cannot hold; write "
            "that of a model of text"
        )
    chosen = _member(bundle, member)
    _check_temperature(bundle, chosen)
    config = bundle.config
    if flavour is Flavour.GENAI:
        given = {"opset": opset, "weights": form}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"the flavour {flavour} has no {name} to choose; leave it out, or write {Flavour.PORTABLE}"
                )
        check_graphs(config)
    else:
        opset, form = DEFAULT_OPSET if opset is None else opset, form or WeightForm.STORED
        if opset not in OPSETS:
            raise ConfigError(f"opset must be in {OPSETS[0]}…{OPSETS[-1]}, got {opset}")
        check_portable(config)
    tensors = stored_tensors(bundle.path / WEIGHTS)
    with new_directory(out, RECORD, _WHAT) as work:
        for file in _TOKENIZER:
            if file in bundle.manifest["files"]:
                shutil.copyfile(bundle.path / file, work / file)
        with DataFile(work / DATA, bundle.path / WEIGHTS) as data:
            if flavour is Flavour.GENAI:
                writer = GraphWriter(config, tensors, data.copy, chosen)
                whole = Slice(embedding=True, start=0, stop=config.num_layers, norm=True, head=True)
                writer.write(whole, work / GRAPH, standard=True)
                _write_json(work / GENAI, _genai_config(config, bundle.eos_token_ids))
            else:
                assert opset is not None and form is not None
                PortableWriter(config, tensors, data, chosen, opset, form).write(work / GRAPH)
                _check(bundle, work / GRAPH)
                _write_configs(bundle, config, work)
        record = {"bundle": bundle.name, "bundle_digest": bundle.digest, "member": chosen, "flavour": flavour}
        _write_json(work / RECORD, record | {"opset": opset, "weights": form})
    return out


def _member(bundle: Bundle, name: str | None) -> str:
    members = list(bundle.members)
    if name is None and len(members) > 1:
        raise ConfigError(f"'{bundle.name}' has the members {members}, and a graph has one; name it (--member)")
    if name is not None and name not in members:
        raise ConfigError(f"'{bundle.name}' has no member '{name}'; its members are {members}")
    return name or members[0]


def _check_temperature(bundle: Bundle, name: str) -> None:
    members = bundle.default_ensemble.members
    if len(members) == 1 and members[0].name == name and members[0].temperature != 1:
        raise UnsupportedModelError(
            f"'{bundle.name}' answers with '{name}' alone at temperature {members[0].temperature:g}, and a graph's logits have "
            "none; export the bundle without that temperature (--mix)"
        )


def _check(bundle: Bundle, graph: Path) -> None:
    """Raises `BundleError` if the shapes of the tensors are not those of the configuration."""
    try:
        onnx.checker.check_model(str(graph), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        said = next(iter(str(error).splitlines()), "")
        raise BundleError(
            f"the tensors of '{bundle.path}' do not fit its configuration ({said}); export it again"
        ) from error


def _write_configs(bundle: Bundle, config: DecoderConfig, work: Path) -> None:
    if CONFIG not in bundle.manifest["files"]:
        raise BundleError(f"'{bundle.path}' has no {CONFIG}, which the graph's runtimes read; export the bundle again")
    values = read_object(bundle.path / CONFIG, "export the bundle again")
    for name in _OF_THE_CHECKPOINT:
        values.pop(name, None)
    context = next((name for name in CONTEXT_NAMES if values.get(name) is not None), CONTEXT_NAMES[0])
    values[context] = config.max_position_embeddings  # how many positions the tables have
    _write_json(work / CONFIG, values)
    generation: dict[str, Any] = {}
    if _GENERATION in bundle.manifest["files"]:
        generation = read_object(bundle.path / _GENERATION, "export the bundle again")
    if bundle.eos_token_ids:
        generation["eos_token_id"] = list(bundle.eos_token_ids)
    _write_json(work / _GENERATION, generation)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


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
