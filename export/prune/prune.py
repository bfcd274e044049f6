"""`prune`: a smaller ordinary Hugging Face directory from a larger one, with a record of what was removed and why."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.checkpoints.huggingface import Weights, checkpoint_digest, open_weights, read_config
from ...runtime.checkpoints.own_encoders import own_files
from ...runtime.checkpoints.pruned import FORMAT, MEMBERS, RECORD, Origin, check_output, earlier_origins
from ...runtime.checkpoints.rewrite import copy_texts, plain_places, write_weights
from ...runtime.checkpoints.weight_files import read_json
from ...runtime.errors import ConfigError, DataError, UnsupportedModelError
from ...runtime.model.config import DecoderConfig
from ...runtime.model.files import new_directory
from ...runtime.model.layout import decoder_layout
from ...runtime.text.tokenizer import Tokenizer
from .config_json import check_describable, check_kept, pruned_config
from .cut import Cut, PrunedWeights
from .layers import choose_layers
from .members import PrunedMember, read_members
from .params import PruneParams
from .trimmed import TrimmedVocabulary, trimmed_vocabulary
from .widths import check_widths, importances, most_important


def prune(
    model_dir: Path,
    out: Path,
    params: PruneParams,
    *,
    chunks: Sequence[Sequence[int]] = (),
    calibration: str = "",
    vocabulary: Sequence[Path] = (),
    tails: Mapping[str, Path] | None = None,
    loras: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Write the pruned model to `out`, as a whole or not at all, and return its record (motet-prune.json).

    `chunks`: token ids of calibration text, each at most as long as the context; `calibration` says what it is, for the record.
    `vocabulary`: text files; tokens that they do not need are removed. `tails`, `loras`: member → directory; what is left of them
    is written to `out/members/<name>`, as members of the pruned model.

    Raises `ConfigError` (more than there is, nothing to remove, `out` is the model or something that `prune` has not made),
    `UnsupportedModelError` (the family's config.json cannot describe it), `DataError` (no text), and what `open_weights` raises.
    """
    config = read_config(model_dir)
    if own_files(model_dir):
        raise UnsupportedModelError(
            f"'{model_dir}' has an encoder beside its decoder, and only models of text are pruned"
        )
    members = read_members(model_dir, config, tails or {}, loras or {})
    check_apart(out, model_dir, *vocabulary, *(member.path for member in members))
    check_output(out, healed=False)
    _check_early(config, params, chunks, members)
    trimmed = trimmed_vocabulary(model_dir, config, vocabulary) if vocabulary else None
    with open_weights(model_dir) as weights:
        fixed = set() if params.from_tails else {layer for member in members for layer in member.own_layers(config)}
        cut, measured = _choose(config, weights, params, chunks, fixed)
        cut = dataclasses.replace(cut, tokens=None if trimmed is None else trimmed.kept)
        check_kept(cut, config)
        used = {"text": calibration, "tokens": sum(map(len, chunks))} if params.measures else None
        why = {"calibration": used, "measured": measured}
        if trimmed is not None:
            why["vocabulary"] = {
                "before": config.vocab_size,
                "after": len(trimmed.kept),
                "corpus": [path.name for path in vocabulary],
            }
        return write_pruned(model_dir, out, weights, cut, why, trimmed, members)


def write_pruned(
    model_dir: Path,
    out: Path,
    weights: Weights,
    cut: Cut,
    why: Mapping[str, Any],
    trimmed: TrimmedVocabulary | None = None,
    members: Sequence[PrunedMember] = (),
) -> dict[str, Any]:
    """Write what `cut` keeps of a model, and return the record, which has the entries of `why` too. Raises as `prune`."""
    config, values = read_config(model_dir), read_json(model_dir / "config.json")
    new_values, new_config = pruned_config(values, config, cut), cut.config(config)
    if trimmed is not None:
        new_values = trimmed.renumbered(new_values)
    source = Origin(model_dir.name, checkpoint_digest(model_dir))
    origins = [origin.after(cut.tokens) for origin in (source, *earlier_origins(model_dir))]
    record = {
        "format": FORMAT,
        "origins": [origin.to_dict() for origin in origins],
        "parameters": {"before": num_parameters(config), "after": num_parameters(new_config)},
        "layers": {"kept": list(cut.layers), "removed": [i for i in range(config.num_layers) if i not in cut.layers]},
        "heads": {str(layer): list(kept) for layer, kept in cut.kv_heads.items()},  # by the original's layer numbers
        "channels": {str(layer): list(kept) for layer, kept in cut.channels.items()},
        **why,
    }
    pruned = PrunedWeights(weights, config, cut)
    with new_directory(out, RECORD, "a pruned model") as work:
        write_weights(work / "model.safetensors", new_config, pruned, pruned.places(plain_places(weights, values)))
        (work / "config.json").write_text(json.dumps(new_values, indent=2) + "\n")
        if trimmed is None:
            copy_texts(model_dir, work)
        else:
            trimmed.write(model_dir, work)
        (work / RECORD).write_text(json.dumps(record) + "\n")
        open_weights(work).close()  # what was written is whole, and fits its config.json
        Tokenizer.from_dir(work).check_ids(new_config.vocab_size)
        base = {"name": out.name, "digest": checkpoint_digest(work)}
        for member in members:
            member.write(work / MEMBERS / member.name, config, cut, base)
    return record


def check_apart(out: Path, *sources: Path) -> None:
    """Raises `ConfigError` if a source is `out` or lies in it: it would be replaced."""
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"'{out}' holds what is pruned, '{source}', and would replace it; choose another directory"
            )


def num_parameters(config: DecoderConfig) -> int:
    return sum(math.prod(shape) for shape in decoder_layout(config).checkpoint_shapes().values())


def _check_early(
    config: DecoderConfig, params: PruneParams, chunks: Sequence[Sequence[int]], members: Sequence[PrunedMember]
) -> None:
    """Before weights are read."""
    check_widths(config, params.heads, params.channels)
    everything = tuple(range(config.num_layers))
    tried = Cut(
        everything,
        dict.fromkeys(everything, (0,)) if params.heads else {},
        dict.fromkeys(everything, (0,)) if params.channels else {},
    )
    check_describable(config, tried)
    if params.from_tails and not (params.chooses_layers and any(member.own_layers(config) for member in members)):
        raise ConfigError(
            "from_tails is about layers of tails; give a tail, and how many layers to remove, or leave it out"
        )
    for member in members:
        member.check(tried)
    if params.measures and not any(chunks):
        raise DataError("there is no calibration text, so nothing can be measured; give a text that is not empty")


def _choose(
    config: DecoderConfig,
    weights: Weights,
    params: PruneParams,
    chunks: Sequence[Sequence[int]],
    fixed: Collection[int],
) -> tuple[Cut, dict[str, Any]]:
    """(what is kept, what was measured)."""
    layers: tuple[int, ...] = tuple(range(config.num_layers))
    measured: dict[str, Any] = {}
    if params.chooses_layers:
        layers, rounds = choose_layers(
            config, weights, chunks, count=params.layers, share=params.share, greedy=params.greedy, fixed=fixed
        )
        measured["block_influence"] = rounds
    heads: dict[int, tuple[int, ...]] = {}
    channels: dict[int, tuple[int, ...]] = {}
    if params.heads is not None or params.channels is not None:
        found = importances(config, weights, chunks, layers)
        if params.heads is not None:
            heads = {layer: most_important(found[layer][0], params.heads) for layer in layers}
            measured["head_importance"] = {layer: found[layer][0].tolist() for layer in layers}
        if params.channels is not None:
            channels = {layer: most_important(found[layer][1], params.channels) for layer in layers}
    return Cut(layers, heads, channels), measured
