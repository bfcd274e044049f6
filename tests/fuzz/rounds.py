"""A round: one random bundle, two engines with other settings over it, some requests; whatever differs is `Wrong`."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from helpers.models import write_tokenizer
from helpers.native import ISAS
from motet.kernels.native.library import EMULATED
from motet.runtime.api.model_info import ModelInfo
from motet.runtime.api.output import PER_TOKEN, Output
from motet.runtime.api.request import Request
from motet.runtime.backends.cpu.backend import CpuBackend
from motet.runtime.engine.engine import Engine
from motet.runtime.engine.open import model_info
from motet.runtime.errors import InvalidRequestError
from motet.runtime.text.tokenizer import Tokenizer

from .answers import Judge, Wrong
from .bundles import write_bundle
from .decoder import Oracle
from .requests import Asker, random_engine, random_requests

CASES = 40  # requests of a round
Answers = dict[tuple[str, int], Output]  # by request and choice


@dataclass(slots=True)
class Tally:
    """What was asked and judged so far."""

    requests: int = 0
    refused: int = 0  # of these, with a typed error
    tokens: int = 0  # judged
    failures: int = 0  # answers that ended with a NumericalError, as the oracle says
    drafted: int = 0


@cache
def _tokenizer() -> Tokenizer:
    with TemporaryDirectory() as path:
        write_tokenizer(Path(path))
        return Tokenizer.from_dir(Path(path))


def run_round(seed: int, tally: Tally, cases: int = CASES) -> None:
    """Raises `Wrong`. The round is the same whenever it is run with the same seed on the same CPU."""
    with TemporaryDirectory() as root:
        try:
            _run(np.random.default_rng(seed), Path(root), tally, cases)
        except Exception as error:
            error.add_note(f"in round {seed}")
            raise


def _run(rng: np.random.Generator, root: Path, tally: Tally, cases: int) -> None:
    bundle = write_bundle(root / "bundle", rng)
    kv, isa = str(rng.choice(["int8", "bf16"])), _random_isa(rng)
    first, second = (random_engine(rng, kv, bundle.config.max_position_embeddings) for _ in range(2))
    second = replace(second, max_model_len=first.max_model_len)
    model = model_info(bundle, first)
    seqs = min(first.max_num_seqs, second.max_num_seqs)
    first, second = replace(first, max_num_seqs=seqs), replace(second, max_num_seqs=seqs)
    requests, refused = random_requests(Asker(rng, model, seqs), cases)
    tally.requests += cases + refused
    tally.refused += refused
    found: list[Answers] = []
    for config, together in ((first, True), (second, False)):
        with Engine(CpuBackend(bundle, config, isa=isa), _tokenizer(), model, config) as engine:
            batches = [requests] if together else [[request] for request in requests]
            found.append({key: a for batch in batches for key, a in _answers(engine, batch, seqs).items()})
            tally.drafted += engine.stats().drafted_tokens
    _check_equal(*found)
    oracle, backend = Oracle(bundle, kv), CpuBackend(bundle, replace(first, max_num_seqs=1, threads=1), isa=isa)
    try:
        judge = Judge(oracle, backend, model.max_model_len)
        _judge(judge, requests, found[0], rng, tally)
    finally:
        backend.close()


def _random_isa(rng: np.random.Generator) -> str:
    """Plain C++ is slower by an order of magnitude under sanitisers, so its turn comes less often."""
    slow = [isa for isa in ISAS if isa in ("portable", EMULATED)]
    fast = [isa for isa in ISAS if isa not in slow]
    return str(rng.choice(slow if not fast or rng.random() < 0.2 else fast))


def _judge(judge: Judge, requests: list[Request], answers: Answers, rng: np.random.Generator, tally: Tally) -> None:
    for request in requests:
        own = {choice: answer for (name, choice), answer in answers.items() if name == request.request_id}
        tally.refused += not own
        for choice, answer in own.items():
            try:
                tally.tokens += judge.check(request, choice, answer)
            except Wrong as error:
                error.add_note(f"{request} → {answer}")
                raise
            tally.failures += answer.error is not None
        if own and rng.random() < 0.2:
            member = request.ensemble.members[rng.integers(len(request.ensemble.members))]
            text = [*request.prompts[member.view], *own[0].token_ids]
            judge.compare_logits(text, judge.bundle.members.index(member.name))
    errors = [mean for _, mean in judge.compared]
    if errors and not np.mean(errors) < 0.03:
        raise Wrong(f"logits are off by {np.mean(errors):.3g} of their size on average")


def _answers(engine: Engine, requests: list[Request], max_num_seqs: int) -> Answers:
    """The answers to requests that arrive together; those that are refused have none."""
    found: Answers = {}
    done = threading.Semaphore(0)

    def on_output(delta: Output) -> None:
        key = delta.request_id, delta.choice
        found.setdefault(key, Output(*key, delta.seed)).extend(delta)
        if delta.finish_reason is not None:
            done.release()

    accepted = 0
    with engine._inbox._changed:
        for request in requests:
            try:
                engine.submit(request, on_output)
                accepted += request.sampling.n
            except InvalidRequestError as error:
                if not _is_bad(request, engine.model, max_num_seqs):
                    raise Wrong(f"{request} was refused: {error}") from error
    for _ in range(accepted):
        if not done.acquire(timeout=60):
            raise Wrong("an answer has not ended")
    return found


def _is_bad(request: Request, model: ModelInfo, max_num_seqs: int) -> bool:
    """Whether the request asks for what the model does not have."""
    members, params = request.ensemble.members, request.sampling
    prompts = [request.prompts[member.view] for member in members]
    sequences = {member.view for member in members}
    ids = [*params.logit_bias, *params.stop_token_ids, *params.logprob_token_ids]
    ids += (token for prompt in request.prompts for token in prompt)
    return (
        not {member.name for member in members} <= set(model.members)
        or len(sequences) > max_num_seqs
        or max(map(len, prompts)) >= model.max_model_len
        or not all(0 <= token < model.vocab_size for token in ids)
    )


def _check_equal(together: Answers, alone: Answers) -> None:
    """The same bits in any company, with drafts and without, however prompts were cut."""
    if together.keys() != alone.keys():
        raise Wrong("the engines refused other requests")
    for key, answer in together.items():
        other = alone[key]
        for name in (*PER_TOKEN, "finish_reason", "text", "error"):
            if repr(getattr(answer, name)) != repr(getattr(other, name)):
                raise Wrong(f"{key}: {name} is {getattr(answer, name)} together, {getattr(other, name)} alone")
