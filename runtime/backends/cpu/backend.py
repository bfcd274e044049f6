"""`CpuBackend`: a bundle on the native kernels of `kernels/native`, the default if they were built.

A step is one native call. It computes the whole packed batch, the head over the mixed rows, and one token per sample.
The trunk runs once over all rows. Members that use the base's layers, with low-rank updates or without, run them
together, each member's rows beside the others'; a member with layers of its own runs them over its rows. The KV cache is
paged. A row's result has the same bits whatever else is in the batch, however its prompt was cut, and with any number
of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BufferedReader
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ....kernels.native.model import BLOCK_SIZE, NativeModel, PackedBatch, Weight
from ....kernels.native.sampling import FUSED_RULES, Sampling
from ....kernels.native.structs import ACTIVATIONS, NORM_PLACES, QK_NORMS, LinearKind, ModelConfig, Rotary, Vector
from ...api.config import EngineConfig
from ...errors import BundleError, ConfigError
from ...model.bundle import WEIGHTS, Bundle
from ...model.layout import EMBEDDING, POSITIONS, ROTARY, WINDOW_ROTARY, Layer, Layout, Norm, decoder_layout
from ...model.stored import own_name, read_tensor, resolve, stored_tensors, stored_weight
from ...sampling.host import merge_outputs, native_samples, sample_rows, split_fused, step_output
from ...sampling.terms import needed_terms, plan_head
from ...schedule.batch import Batch, StepOutput
from ..base import check_block_size

F32 = npt.NDArray[np.float32]


class CpuBackend:
    """`Backend` over the native kernels. It has as many blocks as `max_num_seqs` sequences of `max_model_len`
    positions need.

    `isa` chooses an instruction set (default: the best that this CPU has). Raises `ConfigError`, `BundleError`,
    `UnavailableError` (see `_load`).
    """

    name = "cpu"
    kv_dtype: str
    keeps_trunk: bool
    has_hidden = True
    takes_embedded = True
    can_verify = True
    can_sample_prefill = True

    def __init__(self, bundle: Bundle, config: EngineConfig, *, isa: str | None = None) -> None:
        if config.kv_dtype == "fp8":
            raise ConfigError("kv_dtype fp8 is the torch backend's; the cpu backend has int8 and bf16")
        check_block_size(config, BLOCK_SIZE, f"the cpu backend's kernels have blocks of {BLOCK_SIZE} positions")
        length = config.positions(bundle.config.max_position_embeddings)
        self._num_blocks = config.max_num_seqs * -(-length // BLOCK_SIZE)
        self._num_members = len(bundle.members)
        self._linear_head = bundle.config.linear_head
        self._has_tails = bundle.has_tails
        self.keeps_trunk = bundle.has_tails and bundle.split_layer > 0
        self.kv_dtype = "bf16" if config.kv_dtype == "bf16" else "int8"
        self._model = _load(bundle, self._num_blocks, config, isa)

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_size(self) -> int:
        return BLOCK_SIZE

    def close(self) -> None:
        """Free the native memory and threads."""
        self._model.close()

    def seconds(self) -> dict[str, float]:
        """Seconds spent since the last call in linears, attention, head and other."""
        return self._model.seconds()

    def step(self, batch: Batch) -> StepOutput:
        """Run one batch (see `Backend.step`)."""
        tails = self._has_tails
        needed = [[((m if tails else 0, row), c) for row, m, c in needed_terms(s)] for s in batch.samples]
        outputs = sorted({output for terms in needed for output, _ in terms})
        at = {output: index for index, output in enumerate(outputs)}
        terms = [[(at[output], c) for output, c in terms] for terms in needed]
        plan = plan_head(terms, batch.samples, self._linear_head)
        packed = self._packed(batch, outputs)
        fused, others = split_fused(batch.samples, FUSED_RULES)
        natives = native_samples([plan.mixes[i] for i in fused], [batch.samples[i] for i in fused])
        sampling = Sampling(natives, self._model.vocab_size)
        written = {row: index for index, row in enumerate(row for i in others for row, _ in plan.mixes[i])}
        logits = self._model.generate(packed, plan.rows, plan.temperatures, plan.greedy, sampling.struct, list(written))
        output = step_output(natives, sampling.result)
        if not others:
            return output
        rest_terms = [[(written[row], c) for row, c in plan.mixes[i]] for i in others]
        rest = sample_rows(logits, rest_terms, [batch.samples[i] for i in others])
        return merge_outputs([(fused, output), (others, rest)])

    def hidden(self, batch: Batch) -> list[F32]:
        """Run a batch without samples (see `Backend.hidden`)."""
        tails, starts = self._has_tails, batch.cu_seqlens_q.tolist()
        spans = [range(first, end) for first, end in pairwise(starts)]
        places = [[(m if tails else 0, row) for m in own for row in span] for own, span in zip(batch.members, spans)]
        outputs = sorted({place for own in places for place in own})
        at = {place: index for index, place in enumerate(outputs)}
        states = self._model.step(self._packed(batch, outputs))
        return [
            states[[at[place] for place in own]].reshape(len(members), len(span), -1)
            for own, members, span in zip(places, batch.members, spans)
        ]

    def _packed(self, batch: Batch, outputs: list[tuple[int, int]]) -> PackedBatch:
        """`outputs`: (member, or 0 without tails; row) pairs, ascending."""
        seqs = None
        if self._has_tails:
            seqs = [[s for s, own in enumerate(batch.members) if m in own] for m in range(self._num_members)]
        return PackedBatch(
            token_ids=batch.token_ids,
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            cu_seqlens=batch.cu_seqlens_q,
            context_lens=batch.context_lens,
            block_tables=batch.block_tables,
            trunk_cached=batch.trunk_cached,
            members=seqs,
            outputs=outputs,
            freed_blocks=batch.freed_blocks,
            embedded=None if batch.embedded is None else (batch.embedded.rows, batch.embedded.values),
        )

    def score(self, token_ids: Sequence[int], member: int) -> F32:
        """Logits [S, vocab] of `member` at every position of one sequence (see `Backend.score`). Raises `ConfigError`
        for more tokens than the cache holds."""
        count = len(token_ids)
        blocks = -(-count // BLOCK_SIZE)
        if blocks > self._num_blocks:
            raise ConfigError(f"{count} tokens need {blocks} blocks of KV cache, there are {self._num_blocks}")
        packed = PackedBatch(
            token_ids=np.asarray(token_ids, np.int64),
            positions=np.arange(count, dtype=np.int32),
            slot_mapping=np.arange(count, dtype=np.int64),
            cu_seqlens=np.array([0, count], np.int32),
            context_lens=np.array([count], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            trunk_cached=np.zeros(1, np.bool_),
            members=[[0] if index == member else [] for index in range(self._num_members)] if self._has_tails else None,
            outputs=[(member if self._has_tails else 0, row) for row in range(count)],
            freed_blocks=np.empty(0, np.int32),
        )
        return self._model.head(self._model.step(packed))


def _load(bundle: Bundle, num_blocks: int, config: EngineConfig, isa: str | None) -> NativeModel:
    """Pack a bundle's tensors into a native model. Raises `BundleError` for a tensor that is missing or has another
    shape, `UnavailableError` for sizes that the kernels do not support."""
    decoder = bundle.config
    split = bundle.split_layer
    model = NativeModel(
        ModelConfig(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.intermediate_size,
            num_layers=decoder.num_layers,
            num_heads=decoder.num_heads,
            num_kv_heads=decoder.num_kv_heads,
            head_size=decoder.head_size,
            max_positions=decoder.max_position_embeddings,
            layer_norm=decoder.norm == "layer",
            activation=ACTIVATIONS.index(decoder.activation),
            parallel_residual=decoder.parallel_residual,
            norm_places=NORM_PLACES.index(decoder.norm_places),
            learned=decoder.positions == "learned",
            rotary_size=decoder.rotary_size or decoder.head_size,
            qk_norm=QK_NORMS.index(decoder.qk_norm),
            tied_head=decoder.tied_head,
            split_layer=split,
            num_members=len(bundle.members),
            num_experts=decoder.num_experts,
            experts_per_token=decoder.experts_per_token,
            expert_size=decoder.expert_size,
            normalises_experts=decoder.normalises_experts,
            kv_int8=config.kv_dtype != "bf16",
            num_blocks=num_blocks,
            threads=config.num_threads,
            norm_eps=decoder.norm_eps,
            embedding_scale=decoder.embedding_scale,
            residual_scale=decoder.residual_scale,
            attention_scale=decoder.attention_scale or decoder.head_size**-0.5,
            logit_scale=decoder.logit_scale,
            attention_softcap=decoder.attention_softcap or 0.0,
            logit_softcap=decoder.logit_softcap or 0.0,
        ),
        bundle.tail_of,
        isa,
    )
    layout = decoder_layout(decoder)
    with (bundle.path / WEIGHTS).open("rb") as file:
        loader = _Loader(model, file, bundle)
        loader.shared(layout)  # the largest matrix first, while there is least beside it
        for layer in range(split):
            loader.layer(layer, layout.layers[layer], None)
        for index, owner in enumerate(bundle.tails):
            for layer in range(split, decoder.num_layers):
                loader.layer(layer + index * (decoder.num_layers - split), layout.layers[layer], owner)
        for index, member in enumerate(bundle.members):
            loader.norm((Vector.FINAL_NORM, Vector.FINAL_NORM_BIAS), index, layout.norm, member)
    model.ready()
    return model


class _Loader:
    """Moves tensors from the weights file into a native model. A member's own tensor is preferred to the base's."""

    def __init__(self, model: NativeModel, file: BufferedReader, bundle: Bundle) -> None:
        self._model = model
        self._file = file
        self._bundle = bundle
        self._tensors = stored_tensors(bundle.path / WEIGHTS)
        self._places: dict[tuple[LinearKind, str], int] = {}  # (kind, stored name) → layer that has it already

    def shared(self, layout: Layout) -> None:
        """Load what all members share: head, embedding and the tables of positions."""
        self.linear(LinearKind.HEAD, 0, layout.head, None)
        if layout.head != EMBEDDING:
            self.linear(LinearKind.EMBEDDING, 0, EMBEDDING, None)
        if layout.config.positions == "learned":
            self.vector(Vector.POSITIONS, 0, POSITIONS, None)
        for tables in layout.rotary_tables:
            for vector, name in zip(_TABLES[tables], tables, strict=True):
                self.vector(vector, 0, name, None)

    def layer(self, target: int, layer: Layer, member: str | None) -> None:
        """Load a layer of the decoder, as `member` has it, as the model's layer `target`."""
        if layer.router is not None:
            self.linear(LinearKind.ROUTER, target, f"{layer.router}.weight", member)
        for place, linear in enumerate(layer.linears):
            bias = f"{linear.name}.bias" if linear.bias else None
            which = _LINEARS[place if place < 2 else 2 + place % 2]  # up and down of each expert in turn
            expert = -1 if layer.router is None or place < 2 else place // 2 - 1
            self.linear(which, target, f"{linear.name}.weight", member, bias, expert)
            for index, own in enumerate(self._bundle.members):
                a, b = (own_name(own, f"{linear.name}.{half}") for half in ("lora_a", "lora_b"))
                if a in self._tensors and member is None:
                    self._model.set_adapter(which, target, index, self._tensor(a), self._tensor(b), a)
        norms = (layer.attention_norm, layer.mlp_norm, layer.attention_out_norm, layer.mlp_out_norm)
        for vectors, norm in zip(_NORMS, norms, strict=True):
            if norm is not None:
                self.norm(vectors, target, norm, member)
        for vector, norm in zip((Vector.Q_NORM, Vector.K_NORM), layer.head_norms or ()):
            self.norm((vector,), target, norm, member)
        self._model.set_rotary(target, _ROTARY[layer.rotary])
        if layer.window is not None:
            self._model.set_window(target, layer.window)

    def linear(
        self,
        which: LinearKind,
        target: int,
        name: str,
        member: str | None,
        bias: str | None = None,
        expert: int = -1,
    ) -> None:
        stored = resolve(self._tensors, name, member)
        if (which, stored) in self._places:
            self._model.share_linear(which, target, self._places[which, stored], expert)
            return
        own_bias = None if bias is None else self._tensor(resolve(self._tensors, bias, member))
        self._model.set_linear(which, target, self._weight(stored, own_bias), stored, expert)
        self._places[which, stored] = target

    def norm(self, vectors: tuple[Vector, ...], index: int, norm: Norm, member: str | None) -> None:
        """`vectors`: the model's places for its weight and, if it may have one, its bias."""
        for vector, name in zip(vectors, norm.tensors):
            self.vector(vector, index, name, member)

    def vector(self, which: Vector, index: int, name: str, member: str | None) -> None:
        stored = resolve(self._tensors, name, member)
        self._model.set_vector(which, index, self._tensor(stored), stored)

    def _weight(self, name: str, bias: F32 | None) -> Weight:
        weight = stored_weight(self._tensors, name)
        rows, columns = weight.rows, weight.columns
        if weight.bits == 32:
            return Weight(rows, columns, dense=self._tensor(name), bias=bias)
        values, scales = self._tensor(weight.values), self._tensor(weight.scales)
        minima = None if weight.minima is None else self._tensor(weight.minima)
        return Weight(rows, columns, weight.bits, weight.group_size, values, scales, minima, bias=bias)

    def _tensor(self, name: str) -> npt.NDArray[Any]:
        if name not in self._tensors:
            raise BundleError(f"the bundle at '{self._bundle.path}' has no tensor '{name}'; export it again")
        return read_tensor(self._file, self._bundle.path / WEIGHTS, self._tensors[name])


_TABLES = {ROTARY: (Vector.COS, Vector.SIN), WINDOW_ROTARY: (Vector.WINDOW_COS, Vector.WINDOW_SIN)}
_ROTARY = {None: Rotary.NONE, ROTARY: Rotary.ALL, WINDOW_ROTARY: Rotary.WINDOW}
_NORMS = (
    (Vector.ATTENTION_NORM, Vector.ATTENTION_NORM_BIAS),
    (Vector.MLP_NORM, Vector.MLP_NORM_BIAS),
    (Vector.ATTENTION_OUT_NORM, Vector.ATTENTION_OUT_NORM_BIAS),
    (Vector.MLP_OUT_NORM, Vector.MLP_OUT_NORM_BIAS),
)
_LINEARS = (LinearKind.QKV, LinearKind.OUT, LinearKind.UP, LinearKind.DOWN)  # in the order of `Layer.linears`
