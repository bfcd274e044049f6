"""Whether an answer is right: each of its tokens and log-probabilities, by `kernels.oracle` on the members' own logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from helpers.samples import penalise
from motet.kernels.native.model import BLOCK_SIZE, PackedBatch
from motet.kernels.oracle import reference
from motet.kernels.oracle.truncation import truncate
from motet.runtime.api.output import Output
from motet.runtime.api.request import FinishReason, Request, Space
from motet.runtime.backends.cpu.backend import CpuBackend
from motet.runtime.errors import NumericalError
from motet.runtime.schedule.admission import choice_seed

from .decoder import Oracle

F64 = npt.NDArray[np.float64]
EXACT = 1e-10  # of sums of doubles in another order, relative to the largest term
# The native head computes a mix as two rows, the mix rounded to 8 bits and the remainder (docs/cpu.md). The remainder of a
# group is at most 1/254 of its largest value, and is rounded to 1/254 of that: together 1.55e-5. The rest is float32.
HEAD_8_BITS, HEAD_FLOAT = 2.2e-5, 4e-6


class Wrong(AssertionError):
    """An answer that the oracle does not give."""


class Judge:
    """Judges answers of one model. `backend` is one that no engine uses."""

    def __init__(self, oracle: Oracle, backend: CpuBackend, max_model_len: int) -> None:
        self.bundle, self.backend, self.oracle, self.max_model_len = oracle.bundle, backend, oracle, max_model_len
        self.tails = len(self.bundle.members) > 1
        head = oracle.head
        self.group = head.group or oracle.config.hidden_size
        groups = head.values.reshape(len(head.values), -1, self.group)
        self.column_sums = np.abs(groups).sum(-1)  # [vocab, groups]
        self.compared: list[tuple[float, float]] = []  # (largest, mean) error of native logits against the oracle's

    def hidden(self, tokens: list[int], member: int) -> npt.NDArray[np.float32]:
        """[tokens, hidden]: the native final states of a sequence alone, from one call."""
        count, blocks = len(tokens), -(-len(tokens) // BLOCK_SIZE)
        members = range(len(self.bundle.members))
        batch = PackedBatch(
            token_ids=np.array(tokens, np.int64),
            positions=np.arange(count, dtype=np.int32),
            slot_mapping=np.arange(count, dtype=np.int64),
            cu_seqlens=np.array([0, count], np.int32),
            context_lens=np.array([count], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            trunk_cached=np.zeros(1, np.bool_),
            members=[[0] if m == member else [] for m in members] if self.tails else None,
            outputs=[(member if self.tails else 0, row) for row in range(count)],
            freed_blocks=np.empty(0, np.int32),
        )
        return self.backend._model.step(batch)

    def compare_logits(self, tokens: list[int], member: int) -> None:
        """The native logits of a sequence are the oracle's, up to float32 and values at a rounding boundary. Rows that may
        have other experts are left out."""
        if not self.oracle.is_finite:
            return
        states, head = self.oracle.hidden(tokens, member), self.oracle.head
        found = self.backend._model.head(self.hidden(tokens, member))
        norms = [np.square(x).sum(-1).mean() for x in (states, head.values)]
        size = np.sqrt(norms[0] * norms[1] / states.shape[1])  # of a logit, were states and columns independent
        size *= self.oracle.config.logit_scale
        error = np.abs(found - self.oracle.logits(states)) / max(size, 1e-30)  # a head of zeros has logits of 0
        error = error[~self.oracle.unsure]
        if not error.size:
            return
        if not error.max() < 0.3:
            raise Wrong(f"member {member} on {tokens}: logits are off by {error.max():.3g} of their size")
        self.compared.append((float(error.max()), float(error.mean())))

    def check(self, request: Request, choice: int, answer: Output) -> int:
        """Raises `Wrong`. Returns how many tokens were judged."""
        return _Answer(self, request, choice, answer).check()


class _Answer:
    def __init__(self, judge: Judge, request: Request, choice: int, answer: Output) -> None:
        self.judge, self.request, self.params, self.answer = judge, request, request.sampling, answer
        self.seed = choice_seed(request.sampling.seed or 0, choice)
        bundle, tokens = judge.bundle, answer.token_ids
        index = {name: i for i, name in enumerate(bundle.members)}
        terms = [(index[m.name], m.view, m.mix) for m in request.ensemble.members]
        states = {(m, v): judge.hidden([*request.prompts[v], *tokens], m) for m, v, _ in terms}
        self.first_view = min(view for _, view, _ in terms)
        lengths = [len(prompt) for prompt in request.prompts]
        own = [states[m, v][lengths[v] - 1 :] for m, v, _ in terms]  # [terms][tokens + 1, hidden]
        logits = {key: judge.backend._model.head(state) for key, state in states.items()}
        temperatures = np.array([m.temperature for m in request.ensemble.members], np.float32)
        rows = np.stack([logits[m, v][lengths[v] - 1 :] for m, v, _ in terms], 1)
        self.rows = rows / temperatures[:, None]  # [tokens + 1, terms, vocab]
        self.mix = [c for *_, c in terms]
        self.stops = {*self.params.stop_token_ids, *(() if self.params.ignore_eos else bundle.eos_token_ids)}
        taking_part = [c for c in self.mix if c != 0]
        single = taking_part == [1.0]
        exact = single or request.ensemble.space is Space.PROBS or not judge.oracle.config.linear_head
        self.is_exact = exact or request.return_member_logprobs
        self.peaks = sum(  # [tokens + 1, groups]: the largest value of a group of the mixed state
            abs(c / t) * np.abs(state.astype(np.float64)).reshape(len(state), -1, judge.group).max(-1)
            for c, t, state in zip(self.mix, temperatures.tolist(), own)
            if c != 0
        )

    def tolerance(self, step: int) -> float:
        """By how much the native mixed logits may differ from the oracle's."""
        taking_part = np.array(self.mix) != 0
        largest = float(np.abs(self.rows[step][taking_part]).max()) * sum(map(abs, self.mix))
        if self.is_exact:
            return EXACT * max(largest, 1.0)
        share = HEAD_8_BITS if self.judge.oracle.head.group else HEAD_FLOAT
        share *= self.judge.oracle.config.logit_scale
        return share * float((self.judge.column_sums @ self.peaks[step]).max()) + 1e-6 * largest

    def check(self) -> int:
        tokens, reason = self.answer.token_ids, self.answer.finish_reason
        failed = reason is FinishReason.ERROR
        with np.errstate(all="ignore"):
            for step, token in enumerate(tokens):
                self._check_token(step, token)
            if failed:
                self._check_failure(len(tokens))
        ended = bool(tokens) and tokens[-1] in self.stops
        if any(token in self.stops for token in tokens[:-1]):
            raise Wrong("the answer goes on after a stop token")
        if not failed and ended != (reason is FinishReason.STOP):
            raise Wrong(f"the last token is {tokens[-1:]}, the answer ended by {reason}")
        if not failed and not ended and len(tokens) != self._most_tokens():
            raise Wrong(f"{len(tokens)} tokens, there was room for {self._most_tokens()}")
        for values in (self.answer.logprobs, self.answer.top_logprobs):
            if len(values) != (len(tokens) if self.params.logprobs is not None else 0):
                raise Wrong("not one log-probability a token")
        if len(self.answer.candidate_logprobs) != (len(tokens) if self.params.logprob_token_ids else 0):
            raise Wrong("not one list of candidates' log-probabilities a token")
        if len(self.answer.member_logprobs) != (len(tokens) if self.request.return_member_logprobs else 0):
            raise Wrong("not one list of members' log-probabilities a token")
        return len(tokens) + failed

    def _most_tokens(self) -> int:
        longest = max(len(self.request.prompts[m.view]) for m in self.request.ensemble.members)
        room = self.judge.max_model_len - longest
        return room if self.params.max_tokens is None else min(room, self.params.max_tokens)

    def _adjusted(self, step: int) -> tuple[F64, F64, float]:
        """(mixed logits, edited logits, tolerance of the edited ones)."""
        mixed = reference.mix(self.rows[step], self.mix, self.request.ensemble.space)
        params, output = self.params, self.answer.token_ids[:step]
        first = self.request.prompts[self.first_view]
        adjusted = penalise(
            mixed.copy(),
            first,
            output,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            forbidden=sorted(self.stops) if step < params.min_tokens else (),
        )
        steep = min(max(params.repetition_penalty, 1 / params.repetition_penalty), 1e300)
        finite = adjusted[np.isfinite(adjusted)]
        largest = float(np.abs(finite).max()) if finite.size else 0.0
        return mixed, adjusted, self.tolerance(step) * steep + EXACT * largest

    def _check_failure(self, step: int) -> None:
        if not isinstance(self.answer.error, NumericalError):
            raise Wrong(f"it failed: {self.answer.error!r}")
        mixed, adjusted, _ = self._adjusted(step)
        top = max(mixed.max(), adjusted.max())  # NaN where there is one
        if adjusted.max() > -np.inf and top < np.inf:
            raise Wrong(f"token {step}: {self.answer.error}, but the oracle draws one")

    def _check_token(self, step: int, token: int) -> None:
        mixed, adjusted, tolerance = self._adjusted(step)
        if not (max(mixed.max(), adjusted.max()) < np.inf and adjusted.max() > -np.inf):
            raise Wrong(f"token {step} is {token}, but the oracle has none")
        if not 0 <= token < len(mixed):
            raise Wrong(f"token {step} is {token}")
        temperature = self.params.temperature
        if not temperature >= 1e-200 or not np.isfinite(adjusted.max() / temperature):  # greedy, or as good as greedy
            if not adjusted[token] >= adjusted.max() - 2 * tolerance:
                raise Wrong(f"token {step} is {token}: {adjusted[token]} where {adjusted.max()} is the largest")
        else:
            self._check_draw(step, token, adjusted / temperature, tolerance / temperature)
        self._check_logprobs(step, token, mixed)

    def _check_draw(self, step: int, token: int, tempered: F64, tolerance: float) -> None:
        rules = {n: getattr(self.params, n) for n in ("top_k", "top_p", "min_p", "typical_p")}
        position = len(self.request.prompts[self.first_view]) + step
        drawn = reference.sample(tempered, temperature=1.0, seed=self.seed, position=position, **rules)
        if drawn == token:
            return
        # Another token is right only where two scores, or a score and the border of truncation, are as good as equal.
        scores = tempered + reference.gumbel(np.arange(len(tempered)), position, self.seed)
        kept = truncate(tempered, **_moved(tempered, rules, tolerance))
        sure = truncate(tempered, **_moved(tempered, rules, -tolerance))
        if (
            rules["typical_p"] == 1
        ):  # the other rules keep the largest: those as good as equal to the last one may change places
            kept |= tempered >= tempered[kept].min(initial=np.inf) - 2 * tolerance
            sure &= tempered > tempered[~sure].max(initial=-np.inf) + 2 * tolerance
        if rules["typical_p"] < 1:  # tokens that are as good as equally far from the entropy may change places
            logprobs = reference.log_softmax(tempered)
            entropy = -float(np.sum(np.exp(logprobs) * np.where(np.isfinite(logprobs), logprobs, 0.0)))
            distance = np.abs(-logprobs - entropy)
            slack = 4 * tolerance * (2 + entropy)
            kept |= distance <= distance[kept].max(initial=-np.inf) + slack
            sure &= distance < distance[~sure].min(initial=np.inf) - slack
        best = scores[sure].max() if sure.any() else -np.inf
        if not kept[token] or not scores[token] >= best - 2 * tolerance - 1e-12 * abs(best):
            raise Wrong(
                f"token {step} is {token}, the oracle draws {drawn}: scores {scores[token]} and {scores[drawn]}, "
                f"kept {kept[token]}, tolerance {tolerance:.2g}"
            )

    def _check_logprobs(self, step: int, token: int, mixed: F64) -> None:
        limit = 2 * self.tolerance(step) + 1e-9
        if ids := self.params.logprob_token_ids:
            expected = reference.log_softmax(mixed)[list(ids)]
            found = np.array(self.answer.candidate_logprobs[step])
            if len(found) != len(ids) or not _all_close(found, expected, limit):
                raise Wrong(f"token {step}: the candidates' log-probabilities are {found}, the oracle's {expected}")
        if self.params.logprobs is not None:
            expected = reference.log_softmax(mixed)
            found, top = self.answer.logprobs[step], self.answer.top_logprobs[step]
            best = -np.sort(-expected)[: self.params.logprobs]
            close = abs(found - expected[token]) <= limit or found == expected[token]
            ids = [token_id for token_id, _ in top]
            values = np.array([value for _, value in top])
            good = len(top) == len(best) and len(set(ids)) == len(ids)
            good = good and _all_close(values, expected[ids], limit) and _all_close(values, best, limit)
            if not close or not good or sorted(values, reverse=True) != values.tolist():
                raise Wrong(f"token {step}: log-probabilities {found}, {top}, the oracle's {expected[token]}, {best}")
        if self.request.return_member_logprobs:
            alone = reference.log_softmax(self.rows[step].astype(np.float64))[:, token]
            found = np.array(self.answer.member_logprobs[step])
            if len(found) != len(alone) or not _all_close(found, alone, 1e-9):
                raise Wrong(f"token {step}: the members' log-probabilities are {found}, the oracle's {alone}")


def _all_close(found: F64, expected: F64, limit: float) -> bool:
    with np.errstate(invalid="ignore"):
        same = (found == expected) | (np.isnan(found) & np.isnan(expected))
        return bool((same | (np.abs(found - expected) <= limit)).all())


def _moved(tempered: F64, rules: dict[str, float], by: float) -> dict[str, float]:
    """The rules as they are after all tempered logits have moved by up to |by|: looser for a positive `by`, tighter for a
    negative one."""
    grown, ordered = np.exp(4 * by) * (1 + np.sign(by) * 1e-9), np.sort(tempered)[::-1]
    moved = dict(rules)
    if k := int(rules["top_k"]):
        border = ordered[min(k, len(ordered)) - 1] - 2 * by
        count = int((tempered >= border).sum() if by > 0 else (tempered > border).sum())
        moved["top_k"] = max(1, count)
    for name in ("top_p", "typical_p"):
        if rules[name] < 1:
            moved[name] = float(np.clip(rules[name] * grown, 5e-324, 1.0))
    if rules["min_p"] > 0:
        moved["min_p"] = float(np.clip(rules["min_p"] / grown, 5e-324, 1.0))
    return moved
