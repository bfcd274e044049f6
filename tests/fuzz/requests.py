"""Random requests to a bundle: whatever a client may ask, and what it may not."""

from __future__ import annotations

import math

import numpy as np
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.limits import MAX_MEMBERS
from motet.runtime.api.model_info import ModelInfo
from motet.runtime.api.request import Ensemble, Member, Request, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.errors import MotetError

EXTREMES = (1e-300, -1e-300, 5e-324, 1000.0, -1000.0, 999.0, 1e30, -1e308)


def random_engine(rng: np.random.Generator, kv_dtype: str, context: int) -> EngineConfig:
    """The settings that may not change an answer, at random, for a model with `context` positions."""
    return EngineConfig(
        backend="cpu",
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        max_num_seqs=int(rng.choice([8, 20])),
        max_model_len=min(int(rng.choice([64, 200])), context),
        max_num_batched_tokens=int(rng.choice([4, 16, 64, 256])),
        prefill_chunk=int(rng.choice([1, 4, 7, 32, 64, 256])),
        max_waiting=1000,
        prefix_cache=bool(rng.random() < 0.7),
        speculative_tokens=int(rng.choice([0, 0, 4, 8])),
        threads=int(rng.integers(1, 3)),
    )


class Asker:
    """Random requests to one model, of which at most `max_num_seqs` sequences run at once."""

    def __init__(self, rng: np.random.Generator, model: ModelInfo, max_num_seqs: int) -> None:
        self.rng, self.model, self.max_num_seqs = rng, model, max_num_seqs
        self.length = model.max_model_len
        self.texts = [self._text(self.length) for _ in range(3)]  # prompts often begin alike

    def request(self, name: str) -> Request:
        """Raises `MotetError` for some that may not be asked."""
        rng = self.rng
        prompts = [self._prompt()]
        ensemble, num_views = self._ensemble()
        prompts += [self._prompt() if rng.random() < 0.7 else prompts[0] for _ in range(num_views - 1)]
        return Request(
            name,
            tuple(map(tuple, prompts)),
            ensemble,
            self._sampling(max(map(len, prompts))),
            return_member_logprobs=bool(rng.random() < 0.2),
            cache_salt=b"salt" if rng.random() < 0.1 else b"",
        )

    def _text(self, length: int) -> list[int]:
        """Random tokens, or a pattern that a draft can guess."""
        period = length if self.rng.random() < 0.5 else int(self.rng.integers(1, 7))
        tokens = self.rng.integers(0, self.model.vocab_size, period)
        return [int(token) for token in np.resize(tokens, length)]

    def _prompt(self) -> list[int]:
        rng = self.rng
        size = int(rng.integers(1, 9) if rng.random() < 0.6 else rng.integers(1, self.length + (rng.random() < 0.03)))
        text = self.texts[rng.integers(3)] if rng.random() < 0.5 else self._text(size)
        prompt = text[:size]
        if rng.random() < 0.01:
            prompt[-1] = int(rng.choice([-1, self.model.vocab_size, 2**40]))
        return prompt

    def _ensemble(self) -> tuple[Ensemble, int]:
        rng, names = self.rng, list(self.model.members)
        most = min(MAX_MEMBERS, len(names) * self.max_num_seqs)
        count = most if rng.random() < 0.03 else int(min(most, rng.integers(1, 5)))
        views = -(-count // len(names)) if rng.random() < 0.5 else int(rng.integers(-(-count // len(names)), count + 1))
        views = min(views, self.max_num_seqs + (rng.random() < 0.02))
        pairs = [(name, view) for view in range(views) for name in names]
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:count]]
        space = Space.PROBS if rng.random() < 0.35 else Space.LOGITS
        mix = self._mix(len(chosen), space)
        if rng.random() < 0.01:
            chosen[0] = ("nobody", 0)
        temperatures = rng.choice([0.01, 0.5, 1.0, 1.3, 100.0], len(mix)) if rng.random() < 0.2 else np.ones(len(mix))
        members = tuple(Member(n, c, view, float(t)) for (n, view), c, t in zip(chosen, mix, temperatures))
        return Ensemble(members, space), 1 + max(view for _, view in chosen)

    def _mix(self, count: int, space: Space) -> list[float]:
        rng = self.rng
        mix = rng.random(count) if space is Space.PROBS else rng.standard_normal(count) * rng.choice([0.5, 3, 100])
        mix[rng.random(count) < 0.15] = 0.0
        kind = rng.random()
        if kind < 0.2:  # one member alone, the others with 0
            mix[:] = 0.0
            mix[rng.integers(count)] = 1.0 if rng.random() < 0.8 else 1.0000004
            return mix.tolist()
        if kind < 0.25:
            mix[rng.integers(count)] = rng.choice(EXTREMES)
            mix[rng.integers(count)] = -rng.choice(EXTREMES)
        last = int(rng.integers(count))
        mix[last] = 0.0
        values = mix.tolist()
        if space is Space.PROBS:
            total = max(1.0, sum(values) * 1.25)
            values = [value / total for value in values]
        values[last] = 1.0 - math.fsum(values)
        return values

    def _sampling(self, longest: int) -> SamplingParams:
        rng, vocab = self.rng, self.model.vocab_size
        params: dict[str, object] = {"temperature": 0.0, "ignore_eos": bool(rng.random() < 0.8)}
        params["seed"] = int(rng.integers(2**63)) if rng.random() < 0.9 else int(rng.choice([0, 2**63]))
        params["max_tokens"] = int(rng.integers(1, 9)) if rng.random() < 0.9 else int(rng.integers(1, 30))
        if rng.random() < 0.6:
            params["temperature"] = float(rng.choice([1e-300, 1e-20, 0.01, 0.7, 1.0, 1.0, 3.0, 100.0]))
        options = {
            "top_k": lambda: int(rng.choice([1, 2, 5, 64, 2**31 - 1])),
            "top_p": lambda: float(rng.choice([5e-324, 0.1, 0.5, 0.95, 0.999999])),
            "min_p": lambda: float(rng.choice([1e-300, 0.05, 0.5, 1.0])),
            "typical_p": lambda: float(rng.choice([1e-300, 0.3, 0.9])),
            "repetition_penalty": lambda: float(rng.choice([5e-324, 0.01, 0.5, 1.3, 100.0, 1e308])),
            "presence_penalty": lambda: float(rng.choice([0.5, -0.5, 3.0, -1e308, 1e308])),
            "frequency_penalty": lambda: float(rng.choice([0.3, -0.7, -1e308, 1e308])),
            "logit_bias": self._bias,
            "logprobs": lambda: int(rng.choice([0, 1, 3, 64])),
            "logprob_token_ids": lambda: tuple(rng.integers(0, vocab + (rng.random() < 0.02), 3).tolist()),
            "stop_token_ids": lambda: tuple(rng.integers(0, vocab, 2).tolist()),
            "n": lambda: int(rng.integers(1, 4)),
            "speculative_tokens": lambda: int(rng.choice([0, 2, 8])),
        }
        for name, value in options.items():
            if rng.random() < (0.15 if params["temperature"] or "_p" not in name else 0.05):
                params[name] = value()
        if rng.random() < 0.15:
            params["min_tokens"] = int(rng.integers(0, params["max_tokens"] + 1))  # type: ignore[call-overload]
        return SamplingParams(**params)  # type: ignore[arg-type]

    def _bias(self) -> dict[int, float]:
        rng = self.rng
        values = [0.5, -1.0, 5.0, 100.0, -100.0, 1e30, -1e308, 1e308]
        ids = rng.integers(0, self.model.vocab_size + (rng.random() < 0.02), int(rng.integers(1, 5)))
        if rng.random() < 0.05:
            ids = np.arange(self.model.vocab_size)
        return {int(token): float(rng.choice(values)) for token in ids}


def random_requests(asker: Asker, count: int) -> tuple[list[Request], int]:
    """(so many requests, how many more were refused when they were made)."""
    found: list[Request] = []
    refused = 0
    while len(found) < count:
        try:
            found.append(asker.request(f"r{len(found)}"))
        except MotetError:
            refused += 1
    return found, refused
