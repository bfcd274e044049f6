"""`TorchBackend`: runs a bundle on an NVIDIA GPU, with a paged cache, captured graphs and fused kernels. On a CPU it is the
readable oracle of a whole step.

A step checks the batch and plans its rows on the host, runs the trunk over all rows and each tail over its rows (`forward`),
then mixes, computes the head and draws (`sampler`), and reads the tokens. Steps with only decode rows are replayed from
captured graphs (`cuda_graphs`). The host prepares the sampling while the device runs the model, and waits only for the tokens.

A sequence that cannot be run, because its block table is out of range, runs in the dummy block. Only its request has an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from ...api.config import EngineConfig
from ...errors import MotetError
from ...model.bundle import Bundle
from ...model.config import DecoderConfig
from ...sampling.terms import Terms, needed_terms
from ...schedule.batch import Batch, SampleRow, StepOutput
from .cuda_graphs import DecodeGraphs
from .forward import Forward, MemberRows, RowInputs
from .options import TorchOptions, load_ops
from .packed import Packed
from .paged_cache import DTYPES, PagedCache, block_bytes, blocks_that_fit, cache_dtype, free_bytes
from .row_plan import RowPlan, plan_rows
from .sampler import TorchSampler
from .weights import ModelWeights, Placement, load_weights

BLOCK_SIZE = 16  # positions per block where the configuration does not say
# Rows of the largest captured step. A larger step takes so long that launching its kernels one by one costs nothing.
MAX_CAPTURED = 256

Tensor = torch.Tensor
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Checked:
    """The arrays of a batch, in which sequences that cannot be run use the dummy block."""

    token_ids: I32  # [rows]
    slots: I32  # [rows]
    lengths: I32  # [num_seqs]
    tables: I32  # [num_seqs, width]
    errors: dict[int, str]  # sequence → why it cannot be run


@dataclass(frozen=True, slots=True)
class _Hidden:
    """Hidden states [R, H] of a step, and where those of each member and flat row are."""

    states: Tensor
    places: dict[int, I32]  # member → [rows of the batch] row of `states`; -1 if its tail did not run over it


class TorchBackend:
    """A `Backend` that runs a bundle's tensors in torch. Block `num_blocks` of the cache is the dummy block."""

    name = "torch"
    kv_dtype: str
    keeps_trunk = False
    has_hidden = True
    takes_embedded = False
    can_sample_prefill = False  # chunks and decode rows use different kernels
    can_verify = True  # every sampled row is computed alone, also if a sequence has several

    def __init__(self, bundle: Bundle, config: EngineConfig, options: TorchOptions | None = None) -> None:
        options = options or TorchOptions.of_machine()
        cache_dtype(config.kv_dtype, options.dtype, options.capability)  # refuse before the weights are read
        placement = Placement(options.device, options.dtype, options.keep_quantised)
        self._start(bundle.config, load_weights(bundle, placement), config, options)
        if self._graphs is not None and options.device.type == "cuda":
            index = {name: i for i, name in enumerate(bundle.members)}
            members = bundle.default_ensemble.members
            chosen = self._forward.order({index[member.name] for member in members})
            with torch.inference_mode():
                self._graphs.warm_up(tuple(chosen), config.max_num_seqs)

    @classmethod
    def from_weights(
        cls, decoder: DecoderConfig, weights: ModelWeights, config: EngineConfig, options: TorchOptions
    ) -> TorchBackend:
        """A backend for weights that are already on the device, such as the random ones of a bench."""
        backend = cls.__new__(cls)
        backend._start(decoder, weights, config, options)
        return backend

    @torch.inference_mode()
    def _start(
        self, decoder: DecoderConfig, weights: ModelWeights, config: EngineConfig, options: TorchOptions
    ) -> None:
        if options.device.type == "cpu":
            torch.set_num_threads(config.num_threads)
        self._decoder, self._weights, self._options = decoder, weights, options
        self._max_length = config.positions(decoder.max_position_embeddings)
        block_size = config.block_size or BLOCK_SIZE
        self._max_blocks = -(-self._max_length // block_size)
        kv_dtype = cache_dtype(config.kv_dtype, options.dtype, options.capability)
        self.kv_dtype = next(name for name, dtype in DTYPES.items() if dtype is kv_dtype)
        tail_layers = [len(weights.tails[tail]) for tail in weights.tail_of]
        heads = (decoder.num_kv_heads, block_size, decoder.head_size)
        size = block_bytes(len(weights.trunk) + sum(tail_layers), *heads, kv_dtype)
        self._cache = PagedCache(
            num_blocks=blocks_that_fit(size, config.max_num_seqs * self._max_blocks, free_bytes(options.device)),
            block_size=block_size,
            trunk_layers=len(weights.trunk),
            tail_layers=tail_layers,
            kv_heads=decoder.num_kv_heads,
            head_size=decoder.head_size,
            dtype=kv_dtype,
            device=options.device,
        )
        ops = load_ops(options.kernels)
        self._forward = Forward(decoder, weights, self._cache, ops, options.dtype)
        self._sampler = TorchSampler(
            ops,
            weights.head,
            self._forward.head,
            options.device,
            linear_head=decoder.linear_head,
            plain_head=decoder.linear_head and decoder.logit_scale == 1,
        )
        self._graphs = None
        if options.graphs and not decoder.num_experts:  # the host reads which experts the rows chose
            self._graphs = DecodeGraphs(
                self._run_all_rows,
                largest=max(config.max_num_seqs, min(config.max_num_batched_tokens, MAX_CAPTURED)),
                max_blocks=self._max_blocks,
                block_size=block_size,
                dummy_slot=self._cache.dummy_slot,
                device=options.device,
            )

    @property
    def num_blocks(self) -> int:
        return self._cache.num_blocks

    @property
    def block_size(self) -> int:
        return self._cache.block_size

    def close(self) -> None:
        """Nothing to release: the device memory is freed with the object."""

    def seconds(self) -> dict[str, float]:
        """Empty: parts of a step are not measured, because that would wait for the device."""
        return {}

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepOutput:
        """Run one batch (see `Backend.step`)."""
        checked = self._check(batch)
        hidden = self._run(batch, checked)
        if not batch.samples:
            return self._sampler.sample(hidden.states, [], [])
        terms, errors = self._terms(batch, checked, hidden)
        output = self._sampler.sample(hidden.states, terms, batch.samples)
        output.errors |= errors
        return output

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> list[npt.NDArray[np.float32]]:
        """Run a batch without samples (see `Backend.hidden`). Raises `MotetError` for a sequence that cannot be run."""
        checked = self._check(batch)
        if checked.errors:
            raise MotetError(next(iter(checked.errors.values())))
        found = self._run(batch, checked)
        states = found.states.float().cpu().numpy()
        return [
            np.stack([states[found.places[member][first:end]] for member in own])
            for own, (first, end) in zip(batch.members, pairwise(batch.cu_seqlens_q.tolist()))
        ]

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int], member: int) -> npt.NDArray[np.float32]:
        """Logits f32 [S, vocab] of `member` at every position of one sequence.

        It overwrites the first blocks of the cache, so no sequence may be running.
        """
        size = len(token_ids)
        batch = Batch(
            token_ids=np.asarray(token_ids, np.int64),
            positions=np.arange(size, dtype=np.int32),
            slot_mapping=np.arange(size, dtype=np.int64),
            cu_seqlens_q=np.array([0, size], np.int32),
            context_lens=np.array([size], np.int32),
            block_tables=np.arange(-(-size // self.block_size), dtype=np.int32)[None],
            members=[(member,)],
            trunk_cached=np.zeros(1, np.bool_),
            samples=[],
            freed_blocks=np.empty(0, np.int32),
        )
        logits = self._forward.head(self._run(batch, self._check(batch)).states.float())
        return np.asarray(logits.cpu().numpy())

    # ---- forward -----------------------------------------------------------------------------------------------------

    def _run(self, batch: Batch, checked: _Checked) -> _Hidden:
        plan = plan_rows(batch, np.arange(batch.num_seqs), checked.slots, checked.lengths)
        members = self._forward.order({member for own in batch.members for member in own})
        # A captured step runs every tail over every row. It pays if at least half of each member's rows are needed.
        common = all(2 * sum(member in own for own in batch.members) >= batch.num_seqs for member in members)
        if self._graphs is not None and plan.max_chunk == 0 and common:
            arrays = {**plan.arrays, "token_ids": checked.token_ids, "tables": checked.tables}
            found = self._graphs.step(arrays, tuple(members))
            if found is not None:
                states, rung = found
                rows = np.arange(batch.num_rows, dtype=np.int32)
                return _Hidden(states, {member: i * rung + rows for i, member in enumerate(members)})
        seqs_of = {m: np.array([s for s, own in enumerate(batch.members) if m in own]) for m in members}
        plans = {
            member: plan if len(seqs) == batch.num_seqs else plan_rows(batch, seqs, checked.slots, checked.lengths)
            for member, seqs in seqs_of.items()
        }
        return self._run_plans(checked, plan, plans)

    def _run_plans(self, checked: _Checked, plan: RowPlan, plans: dict[int, RowPlan]) -> _Hidden:
        """Run the trunk over `plan` and each member's tail over its rows, without a graph. `plans` is in
        `Forward.order`."""
        own = {member: f"{member}." for member, member_plan in plans.items() if member_plan is not plan}
        arrays: dict[str, I32] = {**plan.arrays, "token_ids": checked.token_ids, "tables": checked.tables}
        for member, prefix in own.items():
            arrays |= {prefix + name: array for name, array in plans[member].arrays.items()}
            arrays[f"{prefix}index"] = plans[member].index
        device = Packed.of(arrays, self._options.device).device
        tables, max_length = device["tables"], int(checked.lengths.max())

        def inputs(rows: RowPlan, prefix: str) -> RowInputs:
            return RowInputs.of(device, tables, max_length=max_length, max_chunk=rows.max_chunk, prefix=prefix)

        trunk = inputs(plan, "")
        members = [
            MemberRows(member, device[f"{own[member]}index"], inputs(member_plan, own[member]))
            if member in own
            else MemberRows(member, None, trunk)
            for member, member_plan in plans.items()
        ]
        places, at = {}, 0
        for member, member_plan in plans.items():
            places[member] = np.full(plan.num_rows, -1, np.int32)
            places[member][member_plan.index] = at + np.arange(member_plan.num_rows, dtype=np.int32)
            at += member_plan.num_rows
        return _Hidden(self._forward.run(device["token_ids"], trunk, members), places)

    def _run_all_rows(self, token_ids: Tensor, rows: RowInputs, members: tuple[int, ...]) -> Tensor:
        """The step that a graph captures: every member's tail over all rows."""
        return self._forward.run(token_ids, rows, [MemberRows(member, None, rows) for member in members])

    def _terms(self, batch: Batch, checked: _Checked, hidden: _Hidden) -> tuple[list[Terms], dict[int, str]]:
        """Each sample's (row of the hidden states, coefficient) pairs. A sample with a sequence that could not be run has none,
        and an error under its index."""
        seq_of_row = np.repeat(np.arange(batch.num_seqs), np.diff(batch.cu_seqlens_q))
        terms: list[Terms] = []
        errors: dict[int, str] = {}
        for index, sample in enumerate(batch.samples):
            wrong = next((s for row, _, _ in sample.terms if (s := int(seq_of_row[row])) in checked.errors), None)
            if wrong is not None:
                errors[index] = checked.errors[wrong]
                terms.append([])
            else:
                terms.append(self._sample_terms(sample, hidden))
        return terms, errors

    def _sample_terms(self, sample: SampleRow, hidden: _Hidden) -> list[tuple[int, float]]:
        found = [(int(hidden.places[member][row]), c) for row, member, c in needed_terms(sample)]
        assert all(place >= 0 for place, _ in found), f"a member's tail did not run over its row: {sample.terms}"
        return found

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _check(self, batch: Batch) -> _Checked:
        """Find sequences that would read or write outside the cache or the tables. The device does not notice them."""
        counts = np.diff(batch.cu_seqlens_q)
        lengths = batch.context_lens.astype(np.int32)
        width = batch.block_tables.shape[1]
        needed = -(-lengths // self.block_size)
        blocks = batch.block_tables
        used = np.arange(width)[None] < needed[:, None]
        bad_block = used & ((blocks < 0) | (blocks >= self.num_blocks))
        slots = batch.slot_mapping
        bad_row = (slots < 0) | (slots >= self.num_blocks * self.block_size)
        bad_row |= (batch.token_ids < 0) | (batch.token_ids >= self._decoder.vocab_size)
        seq_of_row = np.repeat(np.arange(batch.num_seqs), counts)
        bad_rows = np.zeros(batch.num_seqs, bool)
        bad_rows[seq_of_row[bad_row]] = True
        too_long = (lengths > self._max_length) | (needed > min(width, self._max_blocks))
        wrong = bad_block.any(1) | bad_rows | too_long
        errors = {
            int(s): self._explain(batch, int(s), bool(too_long[s]), blocks[s][bad_block[s]])
            for s in np.flatnonzero(wrong)
        }
        tables = np.where(used, blocks, 0).astype(np.int32)[:, : self._max_blocks]
        token_ids, safe_slots = batch.token_ids.astype(np.int32), slots.astype(np.int32)
        if errors:
            tables[wrong] = self._cache.dummy_block
            lengths = np.where(wrong, np.minimum(counts, tables.shape[1] * self.block_size), lengths).astype(np.int32)
            rows = wrong[seq_of_row]
            token_ids[rows], safe_slots[rows] = 0, self._cache.dummy_slot
        return _Checked(token_ids, safe_slots, lengths, np.ascontiguousarray(tables), errors)

    def _explain(self, batch: Batch, seq: int, too_long: bool, blocks: I32) -> str:
        if too_long:
            return (
                f"the sequence has {int(batch.context_lens[seq])} positions; the cache holds {self._max_length} per sequence in "
                f"{self._max_blocks} blocks; shorten the prompt or raise max_model_len"
            )
        if len(blocks):
            return (
                f"block {int(blocks[0])} of its block table is not in 0…{self.num_blocks - 1}; send the request again"
            )
        return "a token id or slot is out of range; send the request again"
