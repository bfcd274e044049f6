"""Mix and sample on the device, for the torch backend: hidden states in, one `StepOutput` out, one read by the host.

A sample takes one of two ways:

    fused    logits space, no truncation, no penalties, no alternatives asked for: `mix_head_sample`, no logits in memory
    logits   everything else: head rows (one for a mix in logits space, one a member otherwise), then `mix_sample`

Penalties, biases and forbidden tokens change few logits, but of the *mixed* row, and log-probabilities are of the row before
them: such samples have their mixed row written out. Same results as `runtime.sampler` to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from ....kernels.oracle.operands import Draw, LinearWeight, Mixture
from ...api.request import Space
from ...schedule.batch import SampleRow, StepOutput
from .packed import Packed

Tensor = torch.Tensor
Terms = Sequence[tuple[int, float]]  # (row of the hidden states, coefficient)

NO_TOKEN = "the logits hold NaN or leave no token to choose"


@dataclass(slots=True)
class _Found:
    """Device tensors that the host reads together at the end of a step, for samples `index`."""

    index: list[int]
    tokens: Tensor  # [B] int32
    logprobs: Tensor  # [B]
    top_index: list[int] = field(default_factory=list)  # samples whose best tokens are asked for
    top_values: Tensor | None = None  # [T, n] log-probabilities
    top_tokens: Tensor | None = None  # [T, n]
    member_index: list[tuple[int, int]] = field(default_factory=list)  # (sample, number of terms)
    member_values: Tensor | None = None  # [Σ terms] the chosen token under each term


class TorchSampler:
    """`head` yields logits [rows, vocab] float32 of mixed hidden states (see `Forward.head`)."""

    def __init__(
        self, ops: ModuleType, head_weight: LinearWeight, head: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self._ops = ops
        self._head_weight = head_weight
        self._head = head
        self._device = device

    def sample(self, hidden: Tensor, terms: Sequence[Terms], samples: Sequence[SampleRow]) -> StepOutput:
        """One token a sample. hidden [R, H], normed; `terms[i]` are those of `samples[i]`, none with coefficient 0; a
        sample without terms is left out (its error is known already)."""
        fused = [i for i, sample in enumerate(samples) if terms[i] and _is_fused(terms[i], sample)]
        others = [i for i, sample in enumerate(samples) if terms[i] and not _is_fused(terms[i], sample)]
        found = []
        if fused:
            found.append(self._sample_fused(hidden, fused, terms, samples))
        if others:
            found.append(self._sample_logits(hidden, others, terms, samples))
        return self._read(found, samples)

    # ---- the two ways ------------------------------------------------------------------------------------------------

    def _sample_fused(
        self, hidden: Tensor, index: list[int], terms: Sequence[Terms], samples: Sequence[SampleRow]
    ) -> _Found:
        chosen = [samples[i] for i in index]
        arrays = _mixture_arrays([terms[i] for i in index], "") | _draw_arrays(chosen)
        device = Packed.of(arrays, self._device).device
        flags = torch.zeros(len(index), dtype=torch.int32, device=self._device)
        mixture = Mixture(device["starts"], device["rows"], device["coefficients"], flags, any_probs=False)
        tokens, logprobs = self._ops.mix_head_sample(hidden, self._head_weight, mixture, _draw(device, chosen))
        return _Found(index, tokens, logprobs)

    def _sample_logits(
        self, hidden: Tensor, index: list[int], terms: Sequence[Terms], samples: Sequence[SampleRow]
    ) -> _Found:
        chosen = [samples[i] for i in index]
        head_rows, row_terms = _head_rows([terms[i] for i in index], chosen)
        written = [i for i, sample in enumerate(chosen) if _is_edited(sample) or sample.params.logprobs]
        draw_terms = list(row_terms)
        for place, i in enumerate(written):  # these draw from a written row, which lies behind the head's
            draw_terms[i] = [(len(head_rows) + place, 1.0)]
        is_probs = [int(len(draw_terms[i]) > 1 and sample.space is Space.PROBS) for i, sample in enumerate(chosen)]
        device = Packed.of(
            {
                **_mixture_arrays(head_rows, "head_"),
                **_mixture_arrays(draw_terms, ""),
                "is_probs": np.array(is_probs, np.int32),
                **_draw_arrays(chosen),
            },
            self._device,
        ).device
        head_mix = Mixture(device["head_starts"], device["head_rows"], device["head_coefficients"], device["is_probs"])
        logits = self._head(self._ops.mix_rows(hidden, head_mix))
        mixed = self._mixed_rows(logits, [row_terms[i] for i in written], [chosen[i] for i in written])
        rows = torch.cat([logits, self._edit(mixed, [chosen[i] for i in written])]) if written else logits
        mixture = Mixture(
            device["starts"], device["rows"], device["coefficients"], device["is_probs"], any_probs=any(is_probs)
        )
        tokens, logprobs = self._ops.mix_sample(rows, mixture, _draw(device, chosen))
        found = _Found(index, tokens, logprobs)
        if written:
            self._alternatives(found, mixed, written, chosen)
        self._member_logprobs(found, logits, row_terms, chosen)
        return found

    def _mixed_rows(self, logits: Tensor, terms: Sequence[Terms], samples: Sequence[SampleRow]) -> Tensor:
        """The mixed row of each sample written out, [W, vocab] float32."""
        mixed = logits.new_empty(len(terms), logits.shape[1])
        for target, own, sample in zip(mixed, terms, samples, strict=True):
            if len(own) == 1 and own[0][1] == 1:
                target.copy_(logits[own[0][0]])
            elif sample.space is Space.LOGITS:
                target.copy_(sum((c * logits[row] for row, c in own), torch.zeros_like(target)))
            else:
                parts = [logits[row].log_softmax(-1).exp() * c for row, c in own]
                target.copy_(sum(parts, torch.zeros_like(target)).log())
        return mixed

    def _edit(self, mixed: Tensor, samples: Sequence[SampleRow]) -> Tensor:
        """Penalties, biases and forbidden tokens on mixed rows, all in one gather and one scatter."""
        edits = [_edits(sample) for sample in samples]
        sizes = [len(ids) for ids, _, _ in edits]
        if not sum(sizes):
            return mixed
        device = Packed.of(
            {
                "rows": np.repeat(np.arange(len(edits)), sizes).astype(np.int64),
                "ids": np.concatenate([ids for ids, _, _ in edits]),
                "divisors": np.concatenate([divisors for _, divisors, _ in edits]),
                "addends": np.concatenate([addends for _, _, addends in edits]),
            },
            self._device,
        ).device
        places, divisors = (device["rows"], device["ids"]), device["divisors"]
        old = mixed[places]
        new = torch.where(old > 0, old / divisors, old * divisors) + device["addends"]
        return mixed.clone().index_put_(places, new)

    def _alternatives(self, found: _Found, mixed: Tensor, written: list[int], samples: Sequence[SampleRow]) -> None:
        """Log-probabilities of written rows: of the token, before edits, and the best ones."""
        lse = mixed.logsumexp(-1)
        where = Packed.of({"written": np.array(written, np.int64)}, self._device).device["written"]
        tokens = found.tokens[where].long().clamp_min(0)
        found.logprobs[where] = mixed.gather(1, tokens[:, None])[:, 0] - lse
        wanted = max(samples[i].params.logprobs or 0 for i in written)
        if wanted:
            best = mixed.topk(min(wanted, mixed.shape[1]), dim=-1)
            found.top_index = [found.index[i] for i in written]
            found.top_values, found.top_tokens = best.values - lse[:, None], best.indices

    def _member_logprobs(
        self, found: _Found, logits: Tensor, row_terms: Sequence[Terms], samples: Sequence[SampleRow]
    ) -> None:
        asked = [i for i, sample in enumerate(samples) if sample.return_member_logprobs]
        if not asked:
            return
        rows = [row for i in asked for row, _ in row_terms[i]]
        owners = [i for i in asked for _ in row_terms[i]]
        arrays = {"rows": np.array(rows, np.int64), "owners": np.array(owners, np.int64)}
        device = Packed.of(arrays, self._device).device
        chosen = logits[device["rows"]]
        tokens = found.tokens[device["owners"]].long().clamp_min(0)
        found.member_index = [(found.index[i], len(row_terms[i])) for i in asked]
        found.member_values = chosen.gather(1, tokens[:, None])[:, 0] - chosen.logsumexp(-1)

    # ---- the one read ------------------------------------------------------------------------------------------------

    def _read(self, found: list[_Found], samples: Sequence[SampleRow]) -> StepOutput:
        tensors = [
            t
            for part in found
            for t in (part.tokens, part.logprobs, part.top_values, part.top_tokens, part.member_values)
        ]
        arrays = iter(_to_host(tensors, self._device))
        output = StepOutput(
            token_ids=np.zeros(len(samples), np.int64),
            logprobs=np.full(len(samples), np.nan),
            top_logprobs=[[] for _ in samples],
            member_logprobs=[[] for _ in samples],
        )
        for part in found:
            tokens, logprobs, top_values, top_tokens, member_values = (next(arrays) for _ in range(5))
            assert tokens is not None and logprobs is not None
            for place, index in enumerate(part.index):
                if tokens[place] < 0:
                    output.errors[index] = NO_TOKEN
                    continue
                output.token_ids[index] = tokens[place]
                if samples[index].params.logprobs is not None:
                    output.logprobs[index] = logprobs[place]
            if top_values is not None and top_tokens is not None:
                for index, values, ids in zip(part.top_index, top_values, top_tokens, strict=True):
                    output.top_logprobs[index] = _best(values, ids, samples[index].params.logprobs or 0)
            if member_values is not None:
                at = 0
                for index, count in part.member_index:
                    output.member_logprobs[index] = [float(value) for value in member_values[at : at + count]]
                    at += count
        for index in output.errors:
            output.top_logprobs[index], output.member_logprobs[index] = [], []
        return output


def _is_edited(sample: SampleRow) -> bool:
    params = sample.params
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return penalties != (1.0, 0.0, 0.0) or bool(params.logit_bias) or bool(sample.forbidden_ids)


def _is_cut(sample: SampleRow) -> bool:
    params = sample.params
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def _is_fused(terms: Terms, sample: SampleRow) -> bool:
    linear = sample.space is Space.LOGITS or (len(terms) == 1 and terms[0][1] == 1)
    asks_more = bool(sample.params.logprobs) or sample.return_member_logprobs
    return linear and not (_is_cut(sample) or _is_edited(sample) or asks_more)


def _head_rows(terms: Sequence[Terms], samples: Sequence[SampleRow]) -> tuple[list[Terms], list[Terms]]:
    """(what each head row mixes, each sample's terms over head rows): a mix in logits space is one head row."""
    rows: list[Terms] = []
    row_terms: list[Terms] = []
    for own, sample in zip(terms, samples, strict=True):
        if sample.space is Space.LOGITS and not sample.return_member_logprobs:
            row_terms.append([(len(rows), 1.0)])
            rows.append(own)
        else:
            row_terms.append([(len(rows) + i, c) for i, (_, c) in enumerate(own)])
            rows += [[(row, 1.0)] for row, _ in own]
    return rows, row_terms


def _mixture_arrays(terms: Sequence[Terms], prefix: str) -> dict[str, npt.NDArray[np.generic]]:
    flat = [term for own in terms for term in own]
    return {
        f"{prefix}starts": np.cumsum([0, *map(len, terms)]).astype(np.int32),
        f"{prefix}rows": np.array([row for row, _ in flat], np.int32),
        f"{prefix}coefficients": np.array([c for _, c in flat], np.float32),
    }


def _draw_arrays(samples: Sequence[SampleRow]) -> dict[str, npt.NDArray[np.generic]]:
    params = [sample.params for sample in samples]
    return {
        "temperature": np.array([p.temperature for p in params], np.float32),
        "top_k": np.array([min(p.top_k, 2**31 - 1) for p in params], np.int32),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "min_p": np.array([p.min_p for p in params], np.float32),
        "seeds": np.array([sample.seed for sample in samples], np.uint64).view(np.int64),
        "positions": np.array([sample.position for sample in samples], np.int32),
    }


def _draw(device: dict[str, Tensor], samples: Sequence[SampleRow]) -> Draw:
    return Draw(
        device["temperature"],
        device["top_k"],
        device["top_p"],
        device["min_p"],
        device["seeds"],
        device["positions"],
        any_cut=any(map(_is_cut, samples)),
    )


def _edits(
    sample: SampleRow,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Token ids that change, what the repetition penalty divides them by, and what is added (-inf: forbidden)."""
    params = sample.params
    seen = np.unique(np.concatenate([sample.prompt_ids, sample.output_ids]))
    drawn, counts = np.unique(sample.output_ids, return_counts=True)
    biased = np.array(list(params.logit_bias), np.int64)
    forbidden = np.array(sample.forbidden_ids, np.int64)
    ids = np.unique(np.concatenate([seen if params.repetition_penalty != 1 else drawn, drawn, biased, forbidden]))
    divisors = np.where(np.isin(ids, seen), params.repetition_penalty, 1.0).astype(np.float32)
    addends = np.zeros(len(ids), np.float32)
    addends[np.searchsorted(ids, drawn)] -= params.presence_penalty + params.frequency_penalty * counts
    addends[np.searchsorted(ids, biased)] += np.array(list(params.logit_bias.values()), np.float32)
    addends[np.searchsorted(ids, forbidden)] = -np.inf
    return ids.astype(np.int64), divisors, addends


def _best(values: npt.NDArray[np.generic], ids: npt.NDArray[np.generic], count: int) -> list[tuple[int, float]]:
    """The `count` best, best first, the lower id first among equals."""
    pairs = sorted(zip(ids.tolist(), values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return [(int(token_id), float(value)) for token_id, value in pairs[:count]]


def _to_host(tensors: Sequence[Tensor | None], device: torch.device) -> list[npt.NDArray[np.generic] | None]:
    """All copies are under way before the host waits, once."""
    copies = [None if tensor is None else tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return [None if copy is None else copy.numpy() for copy in copies]
