"""Mix and sample on the device, for the torch backend: from hidden states to one `StepOutput`. The host waits once.

A sample is drawn in one of three ways:

    fused    one row before a linear head, no truncation, no edits, no top log-probabilities: `mix_head_sample`, which
             writes no logits to memory
    logits   head rows (see `plan_head`), then `mix_sample`
    host     a truncation rule that the ops do not have: the host reads the head rows and samples as other backends do

Edits apply to the *mixed* row, and log-probabilities are those of the mixed row before edits. So for samples with
either, the mixed row is written to memory. Results equal those of `runtime.sampling.host` up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from ....kernels.oracle.operands import FUSED_RULES, Draw, LinearWeight, Mixture
from ....kernels.oracle.truncation import RULES
from ...api.request import Space
from ...sampling.host import empty_output, put_output, sample_rows, split_fused
from ...sampling.terms import (
    Terms,
    is_mixed_before_head,
    is_single,
    is_tempered,
    mixed_before_head,
    needed_temperatures,
    plan_head,
)
from ...schedule.batch import SampleRow, StepOutput
from .packed import Packed

Tensor = torch.Tensor

NO_TOKEN = "the logits hold NaN or leave no token to choose"


@dataclass(slots=True)
class _DeviceResult:
    """Results of the samples `index` on the device, which the host reads together at the end of a step."""

    index: list[int]
    tokens: Tensor  # [B] int32
    logprobs: Tensor  # [B]
    top_index: list[int] = field(default_factory=list)  # samples that request top log-probabilities
    top_values: Tensor | None = None  # [T, n] log-probabilities
    top_tokens: Tensor | None = None  # [T, n]
    candidate_index: list[tuple[int, int]] = field(default_factory=list)  # (sample, number of candidates)
    candidate_values: Tensor | None = None  # [Σ candidates] log-probabilities
    member_index: list[tuple[int, int]] = field(default_factory=list)  # (sample, number of terms)
    member_values: Tensor | None = None  # [Σ terms] the chosen token under each term


class TorchSampler:
    """`head` returns logits [rows, vocab] float32 of mixed hidden states (see `Forward.head`). `linear_head`: mixing
    hidden states mixes them. `plain_head`: they are just the product with `head_weight`, which the fused op computes."""

    def __init__(
        self,
        ops: ModuleType,
        head_weight: LinearWeight,
        head: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        linear_head: bool = True,
        plain_head: bool = True,
    ) -> None:
        self._ops = ops
        self._head_weight = head_weight
        self._head = head
        self._device = device
        self._linear_head, self._plain_head = linear_head, plain_head

    def sample(self, hidden: Tensor, terms: Sequence[Terms], samples: Sequence[SampleRow]) -> StepOutput:
        """Draw one token per sample. hidden [R, H], normed; `terms[i]` are those of `samples[i]` (see
        `needed_terms`). A sample without terms is skipped: its error is already known."""
        on_device, on_host = split_fused(samples, FUSED_RULES)
        fused = [i for i in on_device if terms[i] and self._is_fused(terms[i], samples[i])]
        others = [i for i in on_device if terms[i] and not self._is_fused(terms[i], samples[i])]
        on_host = [i for i in on_host if terms[i]]
        found = []
        if fused:
            found.append(self._sample_fused(hidden, fused, terms, samples))
        if others:
            found.append(self._sample_logits(hidden, others, terms, samples))
        output = self._read(found, samples)
        if on_host:
            put_output(output, on_host, self._sample_on_host(hidden, on_host, terms, samples))
        return output

    def _is_fused(self, terms: Terms, sample: SampleRow) -> bool:
        plain = sample.edits.is_empty and not sample.sampling.truncation and not _needs_row(sample)
        plain = plain and (len(terms) > 1 or not is_tempered(terms, sample))
        return plain and self._plain_head and is_mixed_before_head(terms, sample, self._linear_head)

    # ---- the three ways ----------------------------------------------------------------------------------------------

    def _sample_fused(
        self, hidden: Tensor, index: list[int], terms: Sequence[Terms], samples: Sequence[SampleRow]
    ) -> _DeviceResult:
        chosen = [samples[i] for i in index]
        rows = [mixed_before_head(terms[i], needed_temperatures(terms[i], samples[i]))[0] for i in index]
        arrays = _mixture_arrays(rows, "") | _draw_arrays(chosen)
        device = Packed.of(arrays, self._device).device
        mixture = _mixture(device, "")
        tokens, logprobs = self._ops.mix_head_sample(hidden, self._head_weight, mixture, _draw(device, chosen))
        return _DeviceResult(index, tokens, logprobs)

    def _sample_logits(
        self, hidden: Tensor, index: list[int], terms: Sequence[Terms], samples: Sequence[SampleRow]
    ) -> _DeviceResult:
        chosen = [samples[i] for i in index]
        plan = plan_head([terms[i] for i in index], chosen, self._linear_head)
        written = [i for i, sample in enumerate(chosen) if not sample.edits.is_empty or _needs_row(sample)]
        draw_terms = list(plan.mixes)
        for place, i in enumerate(written):  # these draw from a written row, which follows the head's rows
            draw_terms[i] = [(len(plan.rows) + place, 1.0)]
        is_probs = [int(len(draw_terms[i]) > 1 and sample.space is Space.PROBS) for i, sample in enumerate(chosen)]
        device = Packed.of(
            {
                **_mixture_arrays(plan.rows, "head_"),
                **_mixture_arrays(draw_terms, ""),
                "is_probs": np.array(is_probs, np.int32),
                **_draw_arrays(chosen),
            },
            self._device,
        ).device
        logits = self._head_logits(hidden, device, plan.temperatures)
        mixed = self._mixed_rows(logits, [plan.mixes[i] for i in written], [chosen[i] for i in written])
        rows = torch.cat([logits, self._edit(mixed, [chosen[i] for i in written])]) if written else logits
        mixture = _mixture(device, "", any_probs=any(is_probs))
        tokens, logprobs = self._ops.mix_sample(rows, mixture, _draw(device, chosen))
        found = _DeviceResult(index, tokens, logprobs)
        if written:
            self._alternatives(found, mixed, written, chosen)
        self._member_logprobs(found, logits, plan.mixes, chosen)
        return found

    def _sample_on_host(
        self, hidden: Tensor, index: list[int], terms: Sequence[Terms], samples: Sequence[SampleRow]
    ) -> StepOutput:
        chosen = [samples[i] for i in index]
        plan = plan_head([terms[i] for i in index], chosen, self._linear_head)
        device = Packed.of(_mixture_arrays(plan.rows, "head_"), self._device).device
        logits = self._head_logits(hidden, device, plan.temperatures).float().cpu().numpy()
        return sample_rows(logits, plan.mixes, chosen)

    def _head_logits(self, hidden: Tensor, device: dict[str, Tensor], temperatures: Sequence[float]) -> Tensor:
        """Logits [head rows, vocab] of the mixtures that `device` holds with the prefix "head_", divided by `temperatures`."""
        logits = self._head(self._ops.mix_rows(hidden, _mixture(device, "head_")))
        if all(temperature == 1 for temperature in temperatures):
            return logits
        divisors = Packed.of({"divisors": np.array(temperatures, np.float32)}, self._device).device["divisors"]
        return logits / divisors[:, None]

    def _mixed_rows(self, logits: Tensor, terms: Sequence[Terms], samples: Sequence[SampleRow]) -> Tensor:
        """The mixed rows of the samples, [W, vocab] float32."""
        mixed = logits.new_empty(len(terms), logits.shape[1])
        for target, planned, sample in zip(mixed, terms, samples, strict=True):
            own = [(row, c) for row, c in planned if c != 0]
            if is_single(own):
                target.copy_(logits[own[0][0]])
            elif sample.space is Space.LOGITS:
                target.copy_(sum((c * logits[row] for row, c in own), torch.zeros_like(target)))
            else:
                parts = [logits[row].log_softmax(-1).exp() * c for row, c in own]
                target.copy_(sum(parts, torch.zeros_like(target)).log())
        return mixed

    def _edit(self, mixed: Tensor, samples: Sequence[SampleRow]) -> Tensor:
        """Apply the samples' edits to their mixed rows [W, vocab], with one gather and one scatter."""
        edits = [sample.edits for sample in samples]
        sizes = [len(one.ids) for one in edits]
        masked = [row for row, one in enumerate(edits) if one.mask is not None]
        if not sum(sizes) and not masked:
            return mixed
        device = Packed.of(
            {
                "rows": np.repeat(np.arange(len(edits)), sizes).astype(np.int64),
                "ids": np.concatenate([one.ids for one in edits]),
                "divisors": np.concatenate([one.divisors for one in edits]).astype(np.float32),
                "penalties": np.concatenate([one.penalties for one in edits]).astype(np.float32),
                "biases": np.concatenate([one.biases for one in edits]).astype(np.float32),
                "masked": np.array(masked, np.int64),
                "masks": np.array([one.mask for one in edits if one.mask is not None], np.uint32).view(np.int32),
            },
            self._device,
        ).device
        places, divisors = (device["rows"], device["ids"]), device["divisors"]
        old = mixed[places]
        new = torch.where(old > 0, old / divisors, old * divisors) - device["penalties"] + device["biases"]
        edited = mixed.clone().index_put_(places, new)
        if masked:
            ids = torch.arange(mixed.shape[1], device=self._device)
            allowed = (device["masks"][:, ids // 32] >> (ids % 32)) & 1
            edited[device["masked"]] = edited[device["masked"]].masked_fill(allowed == 0, float("-inf"))
        return edited

    def _alternatives(
        self, found: _DeviceResult, mixed: Tensor, written: list[int], samples: Sequence[SampleRow]
    ) -> None:
        """Log-probabilities of written rows before edits: of the drawn token, the most probable ones and the
        candidates."""
        lse = mixed.logsumexp(-1)
        where = Packed.of({"written": np.array(written, np.int64)}, self._device).device["written"]
        tokens = found.tokens[where].long().clamp_min(0)
        found.logprobs[where] = mixed.gather(1, tokens[:, None])[:, 0] - lse
        wanted = max(samples[i].sampling.logprobs or 0 for i in written)
        if wanted:
            best = mixed.topk(min(wanted, mixed.shape[1]), dim=-1)
            found.top_index = [found.index[i] for i in written]
            found.top_values, found.top_tokens = best.values - lse[:, None], best.indices
        pairs = [(row, token) for row, i in enumerate(written) for token in samples[i].sampling.candidates]
        if pairs:
            arrays = {"rows": np.array([row for row, _ in pairs]), "tokens": np.array([token for _, token in pairs])}
            device = Packed.of(arrays, self._device).device
            found.candidate_index = [(found.index[i], len(samples[i].sampling.candidates)) for i in written]
            found.candidate_values = mixed[device["rows"], device["tokens"]] - lse[device["rows"]]

    def _member_logprobs(
        self, found: _DeviceResult, logits: Tensor, row_terms: Sequence[Terms], samples: Sequence[SampleRow]
    ) -> None:
        asked = [i for i, sample in enumerate(samples) if sample.sampling.member_logprobs]
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

    def _read(self, found: list[_DeviceResult], samples: Sequence[SampleRow]) -> StepOutput:
        tensors = [
            t
            for part in found
            for t in (
                part.tokens,
                part.logprobs,
                part.top_values,
                part.top_tokens,
                part.member_values,
                part.candidate_values,
            )
        ]
        arrays = iter(_to_host(tensors, self._device))
        output = empty_output(len(samples))
        for part in found:
            tokens, logprobs, top_values, top_tokens, *flat = (next(arrays) for _ in range(6))
            assert tokens is not None and logprobs is not None
            for place, index in enumerate(part.index):
                if tokens[place] < 0:
                    output.errors[index] = NO_TOKEN
                    continue
                output.token_ids[index] = tokens[place]
                if samples[index].sampling.logprobs is not None:
                    output.logprobs[index] = logprobs[place]
            if top_values is not None and top_tokens is not None:
                for index, values, ids in zip(part.top_index, top_values, top_tokens, strict=True):
                    output.top_logprobs[index] = _best(values, ids, samples[index].sampling.logprobs or 0)
            targets = (output.member_logprobs, output.candidate_logprobs)
            for target, counts, values in zip(targets, (part.member_index, part.candidate_index), flat, strict=True):
                at = 0
                if values is None:
                    continue
                for index, count in counts:
                    target[index] = [float(value) for value in values[at : at + count]]
                    at += count
        for index in output.errors:
            output.top_logprobs[index], output.member_logprobs[index], output.candidate_logprobs[index] = [], [], []
        return output


def _needs_row(sample: SampleRow) -> bool:
    """Whether more of the mixed row is read than the token that is drawn from it."""
    return bool(sample.sampling.logprobs or sample.sampling.candidates)


def _mixture_arrays(terms: Sequence[Terms], prefix: str) -> dict[str, npt.NDArray[np.generic]]:
    flat = [term for own in terms for term in own]
    return {
        f"{prefix}starts": np.cumsum([0, *map(len, terms)]).astype(np.int32),
        f"{prefix}rows": np.array([row for row, _ in flat], np.int32),
        f"{prefix}coefficients": np.array([c for _, c in flat], np.float32),
        f"{prefix}is_probs": np.zeros(len(terms), np.int32),
    }


def _mixture(device: dict[str, Tensor], prefix: str, any_probs: bool = False) -> Mixture:
    """From the uploaded arrays of `_mixture_arrays`."""
    starts, rows = device[f"{prefix}starts"], device[f"{prefix}rows"]
    return Mixture(starts, rows, device[f"{prefix}coefficients"], device[f"{prefix}is_probs"], any_probs=any_probs)


def _draw_arrays(samples: Sequence[SampleRow]) -> dict[str, npt.NDArray[np.generic]]:
    sampling = [sample.sampling for sample in samples]
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "temperature": np.array([one.temperature for one in sampling], np.float32),
        "seeds": np.array([one.seed for one in sampling], np.uint64).view(np.int64),
        "positions": np.array([sample.position for sample in samples], np.int32),
    }
    for rule, dtype in FUSED_RULES.items():
        values = [one.truncation.get(rule, RULES[rule].off) for one in sampling]
        if not dtype.is_floating_point:
            values = [min(value, torch.iinfo(dtype).max) for value in values]
        arrays[rule] = np.array(values, np.float32 if dtype.is_floating_point else np.int32)
    return arrays


def _draw(device: dict[str, Tensor], samples: Sequence[SampleRow]) -> Draw:
    names = ("temperature", *FUSED_RULES, "seeds", "positions")
    return Draw(**{name: device[name] for name in names}, any_cut=any(sample.sampling.truncation for sample in samples))


def _best(values: npt.NDArray[np.generic], ids: npt.NDArray[np.generic], count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens, best first; of equal ones the lower id first."""
    pairs = sorted(zip(ids.tolist(), values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return [(int(token_id), float(value)) for token_id, value in pairs[:count]]


def _to_host(tensors: Sequence[Tensor | None], device: torch.device) -> list[npt.NDArray[np.generic] | None]:
    """Copy to the host. All copies are started before the host waits, once."""
    copies = [None if tensor is None else tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return [None if copy is None else copy.numpy() for copy in copies]
