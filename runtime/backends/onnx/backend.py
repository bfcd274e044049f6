"""`OnnxBackend`: a bundle's graphs on ONNX Runtime, with its CPU provider or with the CUDA provider.

A step runs each prefill chunk at batch 1 and all decode rows as one batch: the trunk once, each tail over its rows,
then one head over the rows that are sampled. In `logits` space the members' hidden states are mixed before the head,
which is shared and linear; in `probs` space every member has its own head row.

Past and present keys and values are one bound buffer, so nothing is copied from step to step. The bindings of each
decode batch size are made once and reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ...api.config import EngineConfig
from ...errors import ConfigError
from ...model.bundle import Bundle
from ...sampling.host import sample_rows
from ...sampling.mixing import head_group, mixed_rows
from ...sampling.terms import divide_rows, needed_terms, plan_head
from ...schedule.batch import Batch, StepOutput
from ..base import check_block_size, check_float_cache
from .sessions import bundle_session
from .slot_cache import SlotCache

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


class GraphRunner:
    """One graph and its slots. Its input rows are token ids or hidden states, its output hidden states [B, S,
    hidden]."""

    def __init__(self, session: ort.InferenceSession, bundle: Bundle, num_slots: int, slot_size: int) -> None:
        config = bundle.config
        inputs = {value.name for value in session.get_inputs()}
        layers = sorted(int(name.split(".")[1]) for name in inputs if name.endswith(".key"))
        self.cache = SlotCache(layers, num_slots, config.num_kv_heads, slot_size, config.head_size)
        self._session = session
        self._hidden_size = config.hidden_size
        self._takes_tokens = "input_ids" in inputs
        self._takes_positions = "position_ids" in inputs
        self._output = session.get_outputs()[0].name
        self._decode_inputs = self._new_inputs(num_slots, 1)
        self._decode_output = np.empty((num_slots, 1, config.hidden_size), np.float32)
        self._decode_bindings: dict[int, ort.IOBinding] = {}

    def prefill(self, block: int, rows: npt.NDArray[Any], start: int) -> F32:
        """Run rows [S] or [S, hidden] of one sequence, from position `start` on. Returns hidden states [S, hidden]."""
        size = len(rows)
        inputs = self._new_inputs(1, size)
        self._fill(inputs, rows[None], np.array([start + size], np.int32), np.arange(start, start + size)[None])
        output = np.empty((1, size, self._hidden_size), np.float32)
        binding = self._bind(inputs, output, self.cache.slot(block), 1)
        self._session.run_with_iobinding(binding)
        self.cache.set_length(block, start + size)
        return np.asarray(output[0])

    def decode(self, blocks: Sequence[int], rows: npt.NDArray[Any], context_lens: npt.NDArray[np.int32]) -> F32:
        """Run one row per sequence, [B] or [B, hidden]; `context_lens` [B] include it. Returns hidden states [B,
        hidden]."""
        slots = self.cache.compact(blocks)
        size = len(blocks)
        in_slot_order = np.argsort(slots)
        lens = context_lens[in_slot_order]
        self._fill(
            {name: array[:size] if array.ndim else array for name, array in self._decode_inputs.items()},
            rows[in_slot_order][:, None],
            lens,
            (lens - 1)[:, None],
        )
        if size not in self._decode_bindings:
            self._decode_bindings[size] = self._bind(self._decode_inputs, self._decode_output, 0, size)
        self._session.run_with_iobinding(self._decode_bindings[size])
        for block, length in zip(blocks, context_lens, strict=True):
            self.cache.set_length(block, int(length))
        return np.asarray(self._decode_output[slots, 0])

    def _new_inputs(self, batch: int, size: int) -> dict[str, npt.NDArray[Any]]:
        inputs: dict[str, npt.NDArray[Any]] = {}
        if self._takes_tokens:
            inputs["input_ids"] = np.empty((batch, size), np.int64)
        else:
            inputs["hidden_states"] = np.empty((batch, size, self._hidden_size), np.float32)
        if self._takes_positions:
            inputs["position_ids"] = np.empty((batch, size), np.int64)
        if self.cache.arrays:
            inputs["seqlens_k"] = np.empty(batch, np.int32)
            inputs["total_sequence_length"] = np.empty((), np.int32)
        return inputs

    def _fill(
        self,
        inputs: dict[str, npt.NDArray[Any]],
        rows: npt.NDArray[Any],
        lens: npt.NDArray[np.int32],
        positions: npt.NDArray[Any],
    ) -> None:
        inputs["input_ids" if self._takes_tokens else "hidden_states"][...] = rows
        if self._takes_positions:
            inputs["position_ids"][...] = positions
        if self.cache.arrays:
            inputs["seqlens_k"][...] = lens - 1
            inputs["total_sequence_length"][...] = lens.max()

    def _bind(self, inputs: dict[str, npt.NDArray[Any]], output: F32, slot: int, batch: int) -> ort.IOBinding:
        """Bind the first `batch` rows of the inputs and of the output, and the slots `slot`…`slot + batch - 1`."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            shape = (batch, *array.shape[1:]) if array.ndim else ()
            binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)
        binding.bind_output(self._output, "cpu", 0, np.float32, (batch, *output.shape[1:]), output.ctypes.data)
        for name, array in self.cache.arrays.items():
            shape, address = (batch, *array.shape[1:]), array[slot:].ctypes.data
            binding.bind_input(f"past_key_values.{name}", "cpu", 0, np.float32, shape, address)
            binding.bind_output(f"present.{name}", "cpu", 0, np.float32, shape, address)
        return binding


class OnnxBackend:
    """`Backend` over a bundle's ONNX graphs. A block is as long as the context, and has one slot in each graph's cache.

    Raises `ConfigError` for a bundle without graphs, `BundleError` for a damaged graph.
    """

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        if bundle.graphs is None:
            raise ConfigError(
                f"the onnx backend needs graphs and '{bundle.name}' has none; serve it with the cpu or torch backend, or "
                "export it without --no-graphs"
            )
        check_float_cache(config)
        self._num_blocks = config.max_num_seqs
        self._block_size = config.positions(bundle.config.max_position_embeddings)
        check_block_size(config, self._block_size, "a block of the onnx backend is as long as the context")
        self._num_members = len(bundle.members)

        def runner(file: str) -> GraphRunner:
            return GraphRunner(bundle_session(bundle, file, config), bundle, self._num_blocks, self._block_size)

        self._trunk = runner(bundle.graphs.trunk)
        self._tails = [runner(bundle.graphs.tails[name]) for name in bundle.members] if bundle.has_tails else []
        self._head = bundle_session(bundle, bundle.graphs.head, config)
        self._head_group = head_group(bundle)
        self._linear_head = bundle.config.linear_head

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_size(self) -> int:
        return self._block_size

    name = "onnx"
    kv_dtype = "float32"
    keeps_trunk = False
    has_hidden = True
    takes_embedded = False
    can_sample_prefill = False  # a prefill chunk runs alone, and without the head

    @property
    def can_verify(self) -> bool:
        """False: for several rows of a sequence ONNX Runtime uses other kernels than for one, and they round
        differently."""
        return False

    def close(self) -> None:
        """Nothing to do: sessions and arrays are freed with the object."""

    def seconds(self) -> dict[str, float]:
        """Empty: ONNX Runtime does not report the times of its parts."""
        return {}

    def step(self, batch: Batch) -> StepOutput:
        """Run one batch (see `Backend.step`)."""
        for graph in (self._trunk, *self._tails):
            graph.cache.free(batch.freed_blocks.tolist())
        hidden = self._forward(batch)
        at = {place: index for index, place in enumerate(hidden)}
        terms = [[(at[row, member], c) for row, member, c in needed_terms(s)] for s in batch.samples]
        plan = plan_head(terms, batch.samples, self._linear_head)
        rows, fine_rows = mixed_rows(plan.rows, list(hidden.values()), self._head_group)
        logits = self._logits(rows)
        for row, fine in fine_rows:
            logits[row] += logits[fine]
        divide_rows(logits, plan.temperatures)
        return sample_rows(logits, plan.mixes, batch.samples)

    def hidden(self, batch: Batch) -> list[F32]:
        """Run a batch without samples (see `Backend.hidden`)."""
        for graph in (self._trunk, *self._tails):
            graph.cache.free(batch.freed_blocks.tolist())
        found = []
        for s, (first, end) in enumerate(pairwise(batch.cu_seqlens_q.tolist())):
            block, start = int(batch.block_tables[s, 0]), int(batch.context_lens[s]) - (end - first)
            rows = self._trunk.prefill(block, batch.token_ids[first:end], start)
            tails = [self._tails[member].prefill(block, rows, start) for member in batch.members[s] if self._tails]
            found.append(np.stack(tails or [rows] * len(batch.members[s])))
        return found

    def score(self, token_ids: Sequence[int], member: int) -> F32:
        """Logits [S, vocab] of `member` at every position of one sequence (see `Backend.score`). It overwrites block
        0."""
        tokens = np.asarray(token_ids, np.int64)
        hidden = self._trunk.prefill(0, tokens, 0)
        tails = self._tails[member : member + 1]
        for tail in tails:
            hidden = tail.prefill(0, hidden, 0)
        for graph in (self._trunk, *tails):
            graph.cache.free([0])
        return self._logits(hidden)

    def _forward(self, batch: Batch) -> dict[tuple[int, int], F32]:
        """(row, member) → normed hidden state [hidden], for the last row of each sequence and each of its members."""
        hidden: dict[tuple[int, int], F32] = {}
        starts, blocks = batch.cu_seqlens_q, batch.block_tables[:, 0].tolist()
        lengths = np.diff(starts)
        decoding = [s for s in range(batch.num_seqs) if lengths[s] == 1 and batch.context_lens[s] > 1]
        row_of = starts[1:] - 1  # only last rows are sampled here
        for s in sorted(set(range(batch.num_seqs)) - set(decoding)):
            tokens = batch.token_ids[starts[s] : starts[s + 1]]
            start = int(batch.context_lens[s] - lengths[s])
            rows = self._trunk.prefill(blocks[s], tokens, start)
            for member in batch.members[s]:
                final = self._tails[member].prefill(blocks[s], rows, start) if self._tails else rows
                hidden[int(row_of[s]), member] = final[-1]
        if decoding:
            self._decode(batch, decoding, blocks, hidden)
        return hidden

    def _decode(self, batch: Batch, decoding: list[int], blocks: list[int], hidden: dict[tuple[int, int], F32]) -> None:
        index = np.array(decoding)
        tokens = batch.token_ids[batch.cu_seqlens_q[index]]
        rows = self._trunk.decode([blocks[s] for s in decoding], tokens, batch.context_lens[index])
        for member in range(self._num_members):
            chosen = [i for i, s in enumerate(decoding) if member in batch.members[s]]
            if not chosen:
                continue
            final = rows[chosen]
            if self._tails:
                block_ids = [blocks[decoding[i]] for i in chosen]
                final = self._tails[member].decode(block_ids, final, batch.context_lens[index[chosen]])
            for i, row in zip(chosen, final, strict=True):
                hidden[int(batch.cu_seqlens_q[decoding[i]]), member] = row

    def _logits(self, hidden: F32) -> F32:
        """Logits [R, vocab] of hidden states [R, hidden]."""
        if not len(hidden):
            return np.empty((0, 0), np.float32)
        return np.asarray(self._head.run(None, {"hidden_states": hidden})[0])
