"""`DecoderGraphBackend`: an ONNX decoder that another program exported, with its own keys and values.

The graph takes past keys and values and gives those and the new ones, so each step makes new arrays. A prompt's chunk is run
alone. Sequences that decode are run together if the graph allows the shorter ones to be padded (`DecoderGraph.padding`), each
alone otherwise. What was run together stays together until another set of sequences is asked for: then nothing is copied
between steps beside what the graph copies itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ...api.config import EngineConfig
from ...errors import ConfigError, MotetError, UnimplementedError, UnsupportedModelError
from ...model.bundle import Bundle
from ...model.decoder_graph import GraphConfig, Padding
from ...sampling.host import sample_rows
from ...sampling.terms import divide_rows, needed_terms, plan_head
from ...schedule.batch import Batch, StepOutput
from ..base import check_block_size, check_float_cache
from .interface import GraphInterface
from .sessions import bundle_session

F32 = npt.NDArray[np.float32]

_MOST_LOGITS = 2**24  # that a run of a prompt's rows may give: 64 MiB in float32
_SHORT = 64  # positions; sequences up to this length are padded to each other


@dataclass(frozen=True, slots=True)
class _Past:
    """Keys and values of sequences that were run together: of each layer [sequences, kv_heads, width, head_size]."""

    blocks: tuple[int, ...]
    width: int
    arrays: Sequence[ort.OrtValue]


class GraphRunner:
    """A decoder graph and the past of each block. Raises `UnsupportedModelError` for a graph that has another interface, or
    does not do what it says."""

    def __init__(self, session: ort.InferenceSession, config: GraphConfig, padding: Padding) -> None:
        self.interface = GraphInterface.of(session.get_inputs(), session.get_outputs(), config)
        if padding != "none" and "attention_mask" not in self.interface.rows:
            raise UnsupportedModelError(
                "the graph has no attention_mask, so sequences cannot be padded; export it again"
            )
        self._session, self._config, self._padding = session, config, padding
        self._outputs = ["logits", *(f"present.{name}" for name in self.interface.caches)]
        self._past: dict[int, _Past] = {}
        self._lengths: dict[int, int] = {}
        self._most_rows = max(1, _MOST_LOGITS // config.vocab_size)
        self.last_only = False
        self.last_only = self._gives_last_only()

    def free(self, blocks: Sequence[int]) -> None:
        """Forget blocks. Those that hold nothing are ignored."""
        for block in blocks:
            self._past.pop(block, None)
            self._lengths.pop(block, None)

    def prefill(self, block: int, token_ids: npt.NDArray[np.int64], start: int) -> F32:
        """Run rows of one sequence, from position `start` on, in pieces of bounded logits. Returns the logits [vocab] of the
        last one."""
        for first in range(0, len(token_ids), self._most_rows):
            logits = self._extend(block, token_ids[first : first + self._most_rows], start + first)
        return np.asarray(logits[-1])

    def score(self, block: int, token_ids: npt.NDArray[np.int64]) -> F32:
        """Logits [S, vocab] at every position of one sequence."""
        step = 1 if self.last_only else self._most_rows
        pieces = [
            self._extend(block, token_ids[first : first + step], first) for first in range(0, len(token_ids), step)
        ]
        return np.concatenate(pieces)

    def decode(self, blocks: Sequence[int], token_ids: npt.NDArray[np.int64], lengths: Sequence[int]) -> F32:
        """Run one row per sequence, token_ids [B]; `lengths` [B] are the positions before it, at least one. Returns logits
        [B, vocab]."""
        logits = np.empty((len(blocks), self._config.vocab_size), np.float32)
        for group in self._groups(blocks, lengths):
            chosen = [blocks[i] for i in group]
            past = self._together(chosen)
            logits[group] = self._run(past, token_ids[group][:, None], [lengths[i] for i in group])[:, -1]
        return logits

    def _groups(self, blocks: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the sequences that are run together, in an order that does not depend on the batch's: the longest is at
        most twice as long as the shortest, so that padding takes at most half of a group's memory."""
        if self._padding == "none":
            return [[i] for i in range(len(blocks))]
        groups: dict[int, list[int]] = {}
        for i in sorted(range(len(blocks)), key=lambda i: blocks[i]):
            groups.setdefault(max(lengths[i], _SHORT).bit_length(), []).append(i)
        return list(groups.values())

    def _extend(self, block: int, token_ids: npt.NDArray[np.int64], start: int) -> F32:
        """Rows of one sequence; logits [rows or 1, vocab]."""
        if start == 0:
            self.free([block])
        past = self._together([block]) if start else _Past((block,), 0, self._empty(1, 0))
        return np.asarray(self._run(past, token_ids[None], [start])[0])

    def _together(self, blocks: Sequence[int]) -> _Past:
        """The past of these blocks, in this order: as they were run last, or copied side by side."""
        first = self._past[blocks[0]]
        if first.blocks == tuple(blocks) and all(self._past.get(block) is first for block in blocks):
            return first
        width = max(self._lengths[block] for block in blocks)
        config = self._config
        shape = (len(blocks), config.num_kv_heads, width, config.head_size)
        arrays = [np.zeros(shape, self.interface.cache_type) for _ in self.interface.caches]
        held = {id(past): [a.numpy() for a in past.arrays] for past in (self._past[block] for block in blocks)}
        for row, block in enumerate(blocks):
            past, length = self._past[block], self._lengths[block]
            place = past.blocks.index(block)
            for array, source in zip(arrays, held[id(past)], strict=True):
                array[row, :, self._used(width, length)] = source[place, :, self._used(past.width, length)]
        return _Past(tuple(blocks), width, [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays])

    def _used(self, width: int, length: int) -> slice:
        """Where a sequence's positions are among `width`."""
        return slice(0, length) if self._padding == "right" else slice(width - length, width)

    def _empty(self, count: int, width: int) -> list[ort.OrtValue]:
        shape = (count, self._config.num_kv_heads, width, self._config.head_size)
        return [
            ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self.interface.cache_type)) for _ in self.interface.caches
        ]

    def _run(self, past: _Past, token_ids: npt.NDArray[np.int64], lengths: Sequence[int]) -> F32:
        """Run token_ids [B, S] after `past`, and keep what is present then. Returns logits [B, S or 1, vocab]."""
        count, size = token_ids.shape
        width = past.width + size
        mask = np.zeros((count, width), np.int64)
        for row, length in enumerate(lengths):
            mask[row, self._used(width, length + size)] = 1
        rows: dict[str, npt.NDArray[Any]] = {
            "input_ids": token_ids,
            "attention_mask": mask,
            "position_ids": np.asarray(lengths, np.int64)[:, None] + np.arange(size),
        }
        feeds = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(rows[name], kind))
            for name, kind in self.interface.rows.items()
        }
        feeds |= {f"past_key_values.{n}": v for n, v in zip(self.interface.caches, past.arrays, strict=True)}
        found, *present = self._session.run_with_ort_values(self._outputs, feeds)
        logits: F32 = found.numpy().astype(np.float32, copy=False)
        vocab, shape = self._config.vocab_size, [count, self._config.num_kv_heads, width, self._config.head_size]
        allowed = [(count, 1, vocab)] if self.last_only else [(count, size, vocab), (count, 1, vocab)]
        if logits.shape not in allowed or any(list(value.shape()) != shape for value in present):
            raise UnsupportedModelError(
                f"the graph gives logits {list(logits.shape)} and keys and values {list(present[0].shape())} for {count} × "
                f"{size} tokens after {past.width}; by config.json they are {[count, size, vocab]} and {shape}"
            )
        kept = _Past(past.blocks, width, present)
        for block, length in zip(past.blocks, lengths, strict=True):
            self._past[block], self._lengths[block] = kept, length + size
        return logits

    def _gives_last_only(self) -> bool:
        """Whether the logits are those of the last position alone."""
        try:
            logits = self._extend(0, np.zeros(2, np.int64), 0)
        except MotetError:
            raise
        except Exception as error:  # ONNX Runtime raises many types, all from its C++ side
            raise UnsupportedModelError(f"ONNX Runtime cannot run the graph: {str(error).splitlines()[0]}") from error
        self.free([0])
        return len(logits) == 1


class DecoderGraphBackend:
    """`Backend` over a decoder graph. A block is as long as the context.

    Raises `ConfigError` for a configuration that the graph cannot follow, `BundleError` for a damaged graph,
    `UnsupportedModelError` for one with another interface.
    """

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        graph, sizes = bundle.decoder_graph, bundle.sizes
        if graph is None or not isinstance(sizes, GraphConfig):
            raise ConfigError(f"'{bundle.name}' holds no decoder graph of another program; use OnnxBackend")
        check_float_cache(config)
        if config.onnx_provider != "cpu":
            raise ConfigError(
                f"onnx_provider is {config.onnx_provider}, and a graph that another program exported runs on the CPU only; "
                "leave it out"
            )
        self._num_blocks = config.max_num_seqs
        self._block_size = config.positions(sizes.max_position_embeddings)
        check_block_size(config, self._block_size, "a block of the onnx backend is as long as the context")
        self._runner = GraphRunner(bundle_session(bundle, graph.file, config), sizes, graph.padding)
        self.kv_dtype = str(np.dtype(self._runner.interface.cache_type))

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_size(self) -> int:
        return self._block_size

    name = "onnx"
    kv_dtype: str
    has_hidden = False
    takes_embedded = False
    keeps_trunk = False
    can_sample_prefill = False
    can_verify = False  # several rows of a sequence are rounded otherwise than one

    def close(self) -> None:
        """Nothing to do: sessions and arrays are freed with the object."""

    def seconds(self) -> dict[str, float]:
        """Empty: ONNX Runtime does not report the times of its parts."""
        return {}

    def step(self, batch: Batch) -> StepOutput:
        """Run one batch (see `Backend.step`). Each member's logits are mixed on the host, whatever the space."""
        self._runner.free(batch.freed_blocks.tolist())
        logits = self._forward(batch)
        at = {row: index for index, row in enumerate(logits)}
        terms = [[(at[row], c) for row, _, c in needed_terms(sample)] for sample in batch.samples]
        plan = plan_head(terms, batch.samples, linear_head=False)
        found = [logits[row] for row in logits]
        chosen = [found[state] for ((state, _),) in plan.rows]
        rows = np.stack(chosen) if chosen else np.empty((0, 0), np.float32)
        divide_rows(rows, plan.temperatures)
        return sample_rows(rows, plan.mixes, batch.samples)

    def hidden(self, batch: Batch) -> list[F32]:
        """Raises `UnimplementedError`: the graph gives logits alone."""
        raise UnimplementedError("a graph that another program exported gives logits and no hidden states")

    def score(self, token_ids: Sequence[int], member: int) -> F32:
        """Logits [S, vocab] at every position of one sequence (see `Backend.score`). It overwrites block 0."""
        logits = self._runner.score(0, np.asarray(token_ids, np.int64))
        self._runner.free([0])
        return logits

    def _forward(self, batch: Batch) -> dict[int, F32]:
        """Row → logits [vocab], for the last row of each sequence."""
        logits: dict[int, F32] = {}
        blocks, lengths = batch.block_tables[:, 0].tolist(), batch.context_lens.tolist()
        places = list(pairwise(batch.cu_seqlens_q.tolist()))
        decoding = [s for s, (first, end) in enumerate(places) if end - first == 1 and lengths[s] > 1]
        for s in sorted(set(range(batch.num_seqs)) - set(decoding)):
            first, end = places[s]
            logits[end - 1] = self._runner.prefill(blocks[s], batch.token_ids[first:end], lengths[s] - (end - first))
        if decoding:
            rows = [places[s][0] for s in decoding]
            found = self._runner.decode(
                [blocks[s] for s in decoding], batch.token_ids[rows], [lengths[s] - 1 for s in decoding]
            )
            logits |= dict(zip(rows, found, strict=True))
        return logits
