"""Mix and sample on the native CPU kernels (`kernels/native/cpp/sample.cpp`): the same tokens as `kernels.oracle.reference`.

One call samples a packed batch from rows of logits. It needs no model; if there is one, it runs on the model's threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.errors import InvalidRequestError, MotetError, UnavailableError
from ..oracle.edits import NO_EDITS, Edits
from ..oracle.truncation import RULES
from .library import address, addresses, load
from .model import NativeModel

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

NOT_FINITE, NOTHING_LEFT = 1, 2  # codes of samples without a token (`MotetSampleCode`)

FUSED_RULES = ("top_k", "top_p", "min_p")  # truncation rules that the library computes


@dataclass(slots=True)
class Sample:
    """How one token is chosen. The parameters are those of `kernels.oracle.reference`."""

    terms: Sequence[tuple[int, float]]  # (row of the logits, coefficient), at least one
    probs: bool = False  # space of the mix: True for `probs`, False for `logits`
    temperature: float = 1.0
    truncation: Mapping[str, float] = field(default_factory=dict)  # rule of `FUSED_RULES` → value
    edits: Edits = NO_EDITS
    seed: int = 0
    position: int = 0
    logprobs: int | None = None  # how many of the most probable tokens to report; None: no log-probabilities
    candidates: Sequence[int] = ()  # tokens whose log-probabilities are reported, too; not without `logprobs`
    member_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Sampled:
    """The result of a batch. Log-probabilities are those of the mix before edits, temperature and truncation."""

    token_ids: I64  # [samples], -1 where there is none
    codes: I32  # [samples] 0, `NOT_FINITE` (the logits hold NaN or +inf) or `NOTHING_LEFT`
    logprobs: F64  # [samples] of the chosen token, NaN if not requested
    top_ids: I64  # [samples, n] best first, -1 after the requested ones
    top_logprobs: F64  # [samples, n]
    member_logprobs: F64  # [terms of all samples] of the chosen token under each term alone, NaN if not requested
    candidate_logprobs: F64  # [candidates of all samples], NaN where there is no token


class _Sample(ctypes.Structure):
    """`MotetSample` of motet.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("first_term", "num_terms")),
        *((name, ctypes.c_int32) for name in ("probs", "logprobs", "member_logprobs")),
        *(("candidates", ctypes.c_void_p), ("num_candidates", ctypes.c_int64), ("candidate_logprobs", ctypes.c_void_p)),
        ("top_k", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("top_p", "min_p", "temperature")),
        *((f"edit_{name}", ctypes.c_void_p) for name in ("ids", "divisors", "penalties", "biases")),
        ("num_edits", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        *(("seed", ctypes.c_uint64), ("position", ctypes.c_uint32)),
    ]


class _Sampling(ctypes.Structure):
    """`MotetSampling` of motet.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "stride", "vocab_size", "num_terms")),
        *((name, ctypes.c_void_p) for name in ("term_rows", "coefficients")),
        ("num_samples", ctypes.c_int64),
        ("samples", ctypes.c_void_p),
        ("top_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("token_ids", "codes", "logprobs", "top_ids", "top_logprobs")),
        ("member_logprobs", ctypes.c_void_p),
    ]


class Sampling:
    """Samples in the library's form. A call that gets `struct` writes its results into `result`."""

    def __init__(self, samples: Sequence[Sample], vocab: int) -> None:
        """Raises `InvalidRequestError` for a wrong parameter that the library could not detect (see `_check`)."""
        terms = [term for one in samples for term in one.terms]
        rows = np.array([row for row, _ in terms], np.int64)
        coefficients = np.array([c for _, c in terms], np.float64)
        candidates = np.array([token_id for one in samples for token_id in one.candidates], np.int64)
        count, top = len(samples), max((one.logprobs or 0 for one in samples), default=0)
        self.result = result = Sampled(
            token_ids=np.empty(count, np.int64),
            codes=np.empty(count, np.int32),
            logprobs=np.empty(count, np.float64),
            top_ids=np.empty((count, top), np.int64),
            top_logprobs=np.empty((count, top), np.float64),
            member_logprobs=np.empty(len(terms), np.float64),
            candidate_logprobs=np.empty(len(candidates), np.float64),
        )
        packed = (_Sample * count)()
        self._keep: list[Any] = [packed, rows, coefficients, candidates]  # arrays that the library reads
        first = place = 0
        for target, one in zip(packed, samples, strict=True):
            _pack(target, one, first, vocab, self._keep)
            first += len(one.terms)
            if one.candidates:
                target.num_candidates = len(one.candidates)
                target.candidates = address(candidates[place:])
                target.candidate_logprobs = address(result.candidate_logprobs[place:])
                place += len(one.candidates)
        self.struct = _Sampling(
            *(None, 0, 0, vocab),
            *(len(terms), *addresses(rows, coefficients)),
            *(count, ctypes.addressof(packed), top),
            *addresses(result.token_ids, result.codes, result.logprobs),
            *addresses(result.top_ids, result.top_logprobs, result.member_logprobs),
        )


def sample(
    logits: F32, samples: Sequence[Sample], model: NativeModel | None = None, *, isa: str | None = None
) -> Sampled:
    """Draw a token for each sample. logits [rows, vocab]. With `model`, it runs on the model's threads and
    instruction set; without, `isa` chooses the instruction set (default: the best).

    Raises `InvalidRequestError` for a parameter or id out of its range, `UnavailableError` without the native kernels.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InvalidRequestError(f"logits must be [rows, vocab], got {list(logits.shape)}", field="logits")
    if logits.dtype != np.float32 or logits.strides[1] != 4 or logits.strides[0] < 4 * logits.shape[1]:
        logits = np.ascontiguousarray(logits, np.float32)
    sampling = Sampling(samples, logits.shape[1])
    struct = sampling.struct
    stride = logits.strides[0] // 4 if len(logits) > 1 else logits.shape[1]  # numpy's stride of one row may be anything
    struct.logits, struct.num_rows, struct.stride = logits.ctypes.data, len(logits), stride
    lib = load()
    handle = model.handle if model is not None else None
    code = lib.motet_sample(handle, (isa or "").encode(), ctypes.byref(struct))
    if code:
        message = lib.motet_error().decode()
        raise {1: InvalidRequestError, 2: UnavailableError}.get(code, MotetError)(message)
    return sampling.result


def _pack(target: _Sample, one: Sample, first_term: int, vocab: int, keep: list[Any]) -> None:
    """Fill a `_Sample`. Its arrays are appended to `keep`, which must live as long as it."""

    def kept(values: Any, dtype: type) -> int:
        array: npt.NDArray[Any] = np.ascontiguousarray(values, dtype)
        keep.append(array)
        return address(array)

    _check(one, vocab)
    target.first_term, target.num_terms = first_term, len(one.terms)
    target.probs, target.member_logprobs = one.probs, one.member_logprobs
    target.logprobs = -1 if one.logprobs is None else one.logprobs
    target.temperature = one.temperature
    for rule in FUSED_RULES:
        setattr(target, rule, one.truncation.get(rule, RULES[rule].off))
    target.seed, target.position = one.seed, one.position & 0xFFFFFFFF
    edits = one.edits
    if len(edits.ids):
        target.num_edits, target.edit_ids = len(edits.ids), kept(edits.ids, np.int64)
        target.edit_divisors = kept(edits.divisors, np.float64)
        target.edit_penalties = kept(edits.penalties, np.float64)
        target.edit_biases = kept(edits.biases, np.float64)
    if edits.mask is not None:
        target.mask = kept(edits.mask, np.uint32)


def _check(one: Sample, vocab: int) -> None:
    """Check what the library cannot: numbers that do not fit its types, and lengths of arrays, which it does not
    get."""
    if not 0 <= one.seed < 2**64:
        raise InvalidRequestError(f"seed must be in 0…2^64-1, got {one.seed}", field="seed")
    if unknown := set(one.truncation) - set(FUSED_RULES):
        raise InvalidRequestError(
            f"the native kernels truncate by {FUSED_RULES}, not by {sorted(unknown)}", field="truncation"
        )
    if not -(2**63) <= one.truncation.get("top_k", 0) < 2**63:
        raise InvalidRequestError(f"top_k must be below 2^63, got {one.truncation['top_k']}", field="top_k")
    if one.logprobs is not None and not 0 <= one.logprobs < 2**31:
        raise InvalidRequestError(f"logprobs must be in 0…2^31-1, got {one.logprobs}", field="logprobs")
    edits = one.edits
    if not len(edits.ids) == len(edits.divisors) == len(edits.penalties) == len(edits.biases):
        raise InvalidRequestError(f"the edits of {len(edits.ids)} tokens need arrays of that length", field="edits")
    if edits.mask is not None and edits.mask.shape != (-(-vocab // 32),):
        raise InvalidRequestError(
            f"a mask over {vocab} tokens has {-(-vocab // 32)} words of 32 bits, got the shape {list(edits.mask.shape)}",
            field="mask",
        )
