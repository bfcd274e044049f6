"""Makes a bundle of an ONNX decoder that another program exported: the graph as it is, its data and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ..runtime.api.config import EngineConfig
from ..runtime.api.request import Space
from ..runtime.backends.onnx.decoder_graph import GraphRunner
from ..runtime.backends.onnx.sessions import open_session, pool_threads
from ..runtime.checkpoints.huggingface import eos_token_ids
from ..runtime.checkpoints.weight_files import SHARDS
from ..runtime.errors import BundleError, ConfigError, MotetError, NotFoundError, UnsupportedModelError
from ..runtime.model.bundle import FORMAT, MANIFEST, WEIGHTS
from ..runtime.model.decoder_graph import DecoderGraph, GraphConfig, Padding
from ..runtime.model.files import check_replaceable, file_digest, new_directory
from ..runtime.model.members import MemberKind
from ..runtime.text.tokenizer import Tokenizer
from .bundle_writer import COPIED
from .graph_file import data_files
from .graph_sizes import CONFIG, GENAI, genai_graph, read_settings, read_sizes

F32 = npt.NDArray[np.float32]

_SHORTEST = 3  # tokens of a text that is tried
# Largest distance of logits, relative to their size. Graphs that round activations to 8 bits do so by what else is in a run.
_SAME_IN_PIECES, _SAME_PADDED = 0.1, {"float32": 1e-3, "float16": 2e-2}


def find_graph(model: Path) -> Path | None:
    """The decoder graph that a path means: an .onnx file; what genai_config.json names; or the only .onnx file of a directory
    without weights, or of its folder `onnx`. None: it means none. Raises `ConfigError` for a directory of several."""
    if model.suffix == ".onnx":
        if not model.is_file():
            raise NotFoundError(f"'{model}' does not exist, or is no file")
        return model
    if any((model / name).is_file() for name in (WEIGHTS, SHARDS)):
        return None
    if (model / GENAI).is_file():
        named = model / genai_graph(model / GENAI)
        if not named.is_file():
            raise NotFoundError(f"'{named}' does not exist, and {GENAI} names it; copy it there")
        return named
    found = sorted(model.glob("*.onnx")) or sorted((model / "onnx").glob("*.onnx"))
    if len(found) > 1:
        raise ConfigError(
            f"'{model}' has several graphs: {[file.name for file in found]}; give the file of the one that reads and writes "
            "past_key_values. A decoder in two parts (with and without past) must be exported again as one"
        )
    return found[0] if found else None


def export_decoder_graph(graph: Path, out: Path, *, name: str | None = None) -> Path:
    """Write a bundle of the decoder graph to the directory `out`, which is replaced as a whole. The configuration and the
    tokenizer are in the graph's folder, or, if that is called `onnx`, in the one above it.

    The graph is run on a few tokens: it must say the same of a text in pieces, and it is found out whether it allows sequences
    of different lengths to be padded.

    Raises `ConfigError`, `NotFoundError`, `BundleError` and `UnsupportedModelError` (see `data_files`, `read_sizes`,
    `GraphRunner`).
    """
    check_replaceable(out, MANIFEST, "a bundle")
    folder = graph.parent
    if folder.name == "onnx" and not any((folder / file).is_file() for file in (CONFIG, GENAI)):
        folder = folder.parent
    sizes = read_sizes(folder)
    data = data_files(graph, COPIED)
    tokenizer = Tokenizer.from_dir(folder)
    tokenizer.check_ids(sizes.vocab_size)
    ends = _ends(folder, tokenizer.eos_token_id, sizes.vocab_size)
    with new_directory(out, MANIFEST, "a bundle") as work:
        for file in (graph.name, *data):
            shutil.copyfile(graph.parent / file, work / file)
        for file in COPIED:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, work / file)
        decoder = DecoderGraph(graph.name, data, _padding(work / graph.name, sizes))
        files = {file.name: file_digest(file) for file in sorted(work.iterdir())}
        content = {file: files[file] for file in (graph.name, *data)}
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "name": name or out.name,
            "config": sizes.to_dict(),
            "quantisation": None,
            "split_layer": sizes.num_layers,
            "members": [{"name": str(MemberKind.BASE), "kind": MemberKind.BASE, "mix": 1.0, "provenance": {}}],
            "space": str(Space.LOGITS),
            "graphs": decoder.to_dict(),
            "eos_token_ids": ends,
            "provenance": {
                "base": folder.resolve().name,
                "base_digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
                "mix_chosen_by": None,
            },
            "files": files,
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return out


def _ends(folder: Path, tokenizer_eos: int | None, vocab_size: int) -> list[int]:
    """The ids that end an answer."""
    found = list(eos_token_ids(folder, tokenizer_eos, vocab_size))
    if (folder / GENAI).is_file():
        own = read_settings(folder / GENAI)["model"].get("eos_token_id")
        found += own if isinstance(own, list) else [] if own is None else [own]
    for token_id in found:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise BundleError(f"{GENAI} has eos_token_id {token_id!r}; an id is an integer in 0…{vocab_size - 1}")
    return list(dict.fromkeys(found))


# ---- what the graph does ---------------------------------------------------------------------------------------------


def _padding(graph: Path, sizes: GraphConfig) -> Padding:
    """How sequences can be run together. Raises `UnsupportedModelError` for a graph that does not go on from its past."""
    try:
        session = open_session(str(graph), pool_threads() or EngineConfig().num_threads)
    except MotetError:
        raise
    except Exception as error:  # ONNX Runtime raises many types, all from its C++ side
        raise UnsupportedModelError(
            f"this ONNX Runtime cannot load '{graph.name}': {_said(error)}; export it with operators that it has"
        ) from error
    try:
        return _tried(graph, session, sizes)
    except MotetError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise UnsupportedModelError(
            f"'{graph.name}' cannot be run with the sizes of {CONFIG} or {GENAI}: {_said(error)}; correct these, or export the "
            "graph again"
        ) from error


def _said(error: Exception) -> str:
    """The first line of what an error says; its kind if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _tried(graph: Path, session: ort.InferenceSession, sizes: GraphConfig) -> Padding:
    if sizes.max_position_embeddings < _SHORTEST:
        raise UnsupportedModelError(
            f"a context has at least {_SHORTEST} positions, {CONFIG} or {GENAI} says {sizes.max_position_embeddings}"
        )
    alone = GraphRunner(session, sizes, "none")
    longest = min(24, sizes.max_position_embeddings)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, sizes.vocab_size, max(_SHORTEST, longest // part)) for part in (1, 4, 2)]
    expected = [[_last(alone, text[:-1]), _last(alone, text)] for text in texts]
    worst = max(_distance(_in_pieces(alone, text), wanted[-1]) for text, wanted in zip(texts, expected, strict=True))
    if not worst <= _SAME_IN_PIECES:
        raise UnsupportedModelError(
            f"'{graph.name}' does not go on from its past: of a text in pieces its logits differ by {worst:.2g} of their size, "
            f"allowed is {_SAME_IN_PIECES}; export it again for texts of any length (task text-generation-with-past)"
        )
    if "attention_mask" not in alone.interface.rows:
        return "none"
    limit = _SAME_PADDED[np.dtype(alone.interface.cache_type).name]
    for padding in ("left", "right"):
        if _is_same_padded(GraphRunner(session, sizes, padding), texts, expected, limit):
            return padding
    return "none"


def _last(runner: GraphRunner, text: npt.NDArray[np.int64]) -> F32:
    return runner.prefill(0, text, 0)


def _in_pieces(runner: GraphRunner, text: npt.NDArray[np.int64]) -> F32:
    middle = len(text) // 2
    runner.prefill(0, text[:middle], 0)
    runner.prefill(0, text[middle:-1], middle)
    return np.asarray(runner.decode([0], text[-1:], [len(text) - 1])[0])


def _is_same_padded(
    runner: GraphRunner, texts: list[npt.NDArray[np.int64]], expected: list[list[F32]], limit: float
) -> bool:
    """Whether the last two tokens of texts of different lengths have the logits that they have alone."""
    blocks = range(len(texts))
    for block, text in enumerate(texts):
        if len(text) > 2:
            runner.prefill(block, text[:-2], 0)
    try:
        for step in (0, 1):
            tokens = np.array([text[step - 2] for text in texts], np.int64)
            found = runner.decode([*blocks], tokens, [len(text) + step - 2 for text in texts])
            for row, wanted in zip(found, expected, strict=True):
                if not _distance(row, wanted[step]) <= limit:
                    return False
    except Exception as error:  # of ONNX Runtime: an operator that does not know what it is given
        if "allocate memory" in str(error):
            raise
        return False
    return True


def _distance(found: F32, expected: F32) -> float:
    """Relative to the size of the expected values; NaN for values that are not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-9))
