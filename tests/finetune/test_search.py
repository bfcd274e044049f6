"""Search and fusion: resumed after kill -9 with the same trials, a mix that is what it should be, honest reports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from motet.finetune.params import TuneParams
from motet.finetune.search.fuse import fuse
from motet.finetune.search.mixfit import (
    Pool,
    convex,
    cross_validated,
    em,
    fit_mix,
    greedy,
    paired_bootstrap,
    select_and_fit,
    shrink,
)
from motet.finetune.search.objective import chosen_members, mixed_loss, trial_values
from motet.finetune.search.params import FuseParams, SearchParams, SearchSpace
from motet.finetune.search.repro import repro
from motet.finetune.search.search import private_budget, read_trials, search
from motet.finetune.search.space import Trial, distributions, is_hopeless, suggest
from motet.finetune.training.train import Workbench
from motet.finetune.training.trunk_cache import TrunkCache
from motet.runtime.api.request import Space
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.members.adapter import random_adapter, write_adapter
from motet.runtime.checkpoints.members.tail import read_tail
from motet.runtime.errors import BundleError, ConfigError, DataError, UnsupportedModelError

BASE = TuneParams(examples=24, validation_examples=8, max_length=100, batch_tokens=256, bag=0.7, epochs=1)
SPACE = SearchSpace(layers=(1, 2), batch_tokens=(256,), schedule=("cosine",), learning_rate=(1e-4, 3e-2))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"say {i}", "completion": f"the answer is {i % 3}"}) + "\n" for i in range(60))
    )
    return str(path)


@pytest.fixture
def bench(tiny_model_dir, data, tmp_path):
    return Workbench(tiny_model_dir("llama"), data, TrunkCache(tmp_path / "cache"))


def outcome(trials):
    return [(t.number, t.params, t.value, t.curve, t.state) for t in trials]


@pytest.mark.slow
def test_search_and_fuse(bench, tmp_path):
    params = SearchParams(BASE, SPACE, trials=7, startup=3, prune=False)
    result = search(bench, tmp_path / "s", params)
    assert [trial.number for trial in result.trials] == list(range(7))
    assert result.best.value == min(trial.value for trial in result.trials)
    page = (tmp_path / "s" / "report.html").read_text()
    assert f"Best: trial {result.best.number}, validation loss {result.best.value:.4f} nats" in page
    for trial in result.trials:
        assert f'<th scope="row">{trial.number}</th><td>{trial.value:.4f}</td><td>{trial.state}</td>' in page
        assert f"<td>{trial.params['learning_rate']:.3g}</td>" in page
    assert outcome(search(bench, tmp_path / "s", params).trials) == outcome(result.trials)  # done: nothing is run again
    with pytest.raises(ConfigError, match="other settings"):
        search(bench, tmp_path / "s", SearchParams(BASE, SPACE, trials=7, seed=1))
    members = {path.name: path for path in result.members()}
    scored = {name: answer_logprobs(bench, path) for name, path in {"base": None, **members}.items()}
    exact = Workbench(bench.model_dir, bench.data, None)  # no cache: it holds hidden states in bfloat16
    for space in Space:
        fused = fuse(exact, members, tmp_path / f"f-{space}", FuseParams(space, test_examples=8, validation_examples=8))
        mix, report = fused["mix"], fused["report"]
        assert sum(mix.values()) == pytest.approx(1, abs=1e-9)
        assert 1 <= len(mix) <= 4
        assert set(report["members"]) == set(scored)
        for name, figures in report["members"].items():
            assert figures["validation"] == pytest.approx(mixed_nll(scored, {name: 1.0}, space), rel=1e-4)
        fitted = mixed_nll(scored, mix, space)
        assert report["fitted"]["validation"] == pytest.approx(fitted, rel=1e-4)
        others = np.random.default_rng(0).dirichlet(
            np.ones(len(mix)), 20
        )  # other mixes of the same members are no better
        share = fused["shrinkage"]
        if share < 1:
            best = {name: (m - share / len(mix)) / (1 - share) for name, m in mix.items()}  # before it was shrunk
            assert mixed_nll(scored, best, space) <= min(
                mixed_nll(scored, dict(zip(mix, other)), space) + 1e-4 for other in others
            )
        card = (tmp_path / f"f-{space}" / "README.md").read_text()
        figures = " | ".join(f"{report['fitted'][name]:.4f}" for name in ("validation", "validation_nested", "test"))
        assert f"| fitted mix | {figures} |" in card
        assert ", ".join(f"{name} {value:.3f}" for name, value in mix.items()) in card


def answer_logprobs(bench, member):
    """Log-probabilities [T, vocab] of the validation answers' positions and their tokens [T], from a tail's checkpoint (None:
    the base): whole texts, one at a time."""
    weights = {**bench.base, **(read_tail(member)[1] if member else {})}
    decoder, rows, targets = Decoder.from_weights(bench.config, weights), [], []
    for item in bench.load(TuneParams(max_length=320), {"validation": 8}).parts["validation"]:
        tokens, answer = torch.tensor(item.encoded.token_ids), item.encoded.answer
        with torch.no_grad():
            rows.append(decoder(tokens[None, :-1])[0, answer - 1 :].double().log_softmax(-1))
        targets.append(tokens[answer:])
    return torch.cat(rows), torch.cat(targets)


def mixed_nll(scored, mix, space) -> float:
    """Nats a token of a mix of members: of their logits, or of their probabilities."""
    targets = next(iter(scored.values()))[1]
    if space is Space.LOGITS:
        mixed = sum(c * scored[name][0] for name, c in mix.items()).log_softmax(-1)
    else:
        mixed = sum(c * scored[name][0].exp() for name, c in mix.items()).log()
    return float(-mixed.gather(1, targets[:, None]).mean())


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_search_ends_with_the_same_trials(tiny_model_dir, data, tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom motet.finetune.params import TuneParams\n"
        "from motet.finetune.search.params import SearchParams, SearchSpace\n"
        "from motet.finetune.search.search import search\n"
        "from motet.finetune.training.train import Workbench\nfrom motet.finetune.training.trunk_cache import TrunkCache\n"
        f"params = SearchParams({BASE!r}, {SPACE!r}, trials=5, startup=2)\n"
        "bench = Workbench(Path(sys.argv[1]), sys.argv[2], TrunkCache(Path(sys.argv[3])))\n"
        "search(bench, Path(sys.argv[4]), params, on_trial=lambda trial, best: print(trial.number, flush=True))\n"
    )
    command = [sys.executable, "-c", code, str(tiny_model_dir("llama")), data, str(tmp_path / "cache")]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    victim = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    while victim.stdout.readline() != "2\n":
        pass
    time.sleep(0.2)  # into the next trial
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    with (tmp_path / "killed" / "trials.jsonl").open("a") as file:
        file.write('{"number": 3, "par')  # and it died in a line
    again = subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert "0" not in again.stdout.split()
    assert outcome(read_trials(tmp_path / "killed")) == outcome(read_trials(tmp_path / "whole"))


@pytest.mark.slow
def test_the_gaussian_process_looks_where_it_is_good():
    """On a smooth function the posterior's suggestions are better than chance: closer to the optimum, on average."""
    space = distributions(SPACE, "tail", 4)

    def closeness(sampler, seed):
        trials = []
        for number in range(14):
            values = suggest(trials, space, sampler=sampler, seed=seed, startup=5)
            value = (np.log(values["learning_rate"] / 3e-3)) ** 2 + values["dropout"]
            trials.append(Trial(number, values, float(value), (), "complete", 0.0))
        return np.mean([trial.value for trial in trials[5:]])

    assert sum(closeness("gp", seed) < closeness("random", seed) for seed in range(3)) == 3


def test_hopeless_trials():
    trials = [Trial(i, {}, v, ((0, v),), "complete", 0.0) for i, v in enumerate((1.0, 2.0, 3.0, 4.0))]
    assert is_hopeless(trials, 0, 3.5)
    assert not is_hopeless(trials, 0, 2.5)
    assert not is_hopeless(trials[:3], 0, 9.0)  # too few to tell
    assert not is_hopeless(trials, 1, 9.0)


@pytest.mark.slow
def test_only_the_same_search_goes_on(bench, tmp_path, tiny_model_dir):
    """Another tokenizer, template or split: a search is refused, a member is not fused, its run not repeated."""
    params, out = SearchParams(BASE, SPACE, trials=1), tmp_path / "s"
    (member,) = search(bench, out, params).members()
    model_dir = tmp_path / "other"
    shutil.copytree(bench.model_dir, model_dir)
    template = model_dir / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant", "<|im_start|>bot"))
    other = Workbench(model_dir, bench.data, bench.cache)
    other.model_dir = bench.model_dir  # the name is in the settings too
    with pytest.raises(ConfigError, match="tokenizer or data"):
        search(other, out, params)
    with pytest.raises(BundleError, match="tokenizer has the digest"):
        repro(member, model_dir, bench.cache)
    records = [json.loads(line) for line in Path(bench.data).read_text().splitlines()]
    Path(bench.data).write_text("".join(json.dumps({**r, "source": f"s{i}"}) + "\n" for i, r in enumerate(records)))
    moved = Workbench(bench.model_dir, bench.data, bench.cache)
    with pytest.raises(ConfigError, match="tokenizer or data"):
        search(moved, out, params)
    with pytest.raises(BundleError, match="among the test examples"):
        fuse(moved, {"m": member}, tmp_path / "f")


def composed_by_hand(records, delta) -> float:
    """ε of all the steps of `records` in one accountant, step by step, as Opacus' own training loop counts them."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for record in records:
        for _ in range(record["steps"]):
            accountant.step(noise_multiplier=record["noise_multiplier"], sample_rate=record["sample_rate"])
    return float(accountant.get_epsilon(delta=delta))


@pytest.mark.slow
def test_a_private_search_composes_its_trials(bench, tmp_path):
    """The limit of examples is far above what there is, and each trial sees a bag: what counts is what trained."""
    base = TuneParams(
        examples=1000, validation_examples=8, max_length=100, bag=0.5, epochs=1, epsilon=2.0, batch_examples=6
    )
    params = SearchParams(base, SPACE, trials=2)
    out = tmp_path / "s"
    result = search(bench, out, params)
    assert all(trial.state == "complete" for trial in result.trials)
    records = [read_tail(path)[0]["privacy"] for path in result.members()]
    num_examples = read_tail(result.members()[0])[0]["data"]["trained_on"]
    assert num_examples < 40 and records[0]["sample_rate"] == 6 / num_examples
    spent = private_budget(result.trials)
    assert spent["delta"] == min(record["delta"] for record in records) < 1 / num_examples
    assert spent["epsilon"] == pytest.approx(composed_by_hand(records, spent["delta"]), rel=1e-6)
    assert spent == json.loads((out / "privacy.json").read_text())
    assert not list((out / "trials").glob(".*.run"))  # no secret is left
    # The last trial ended, and the search was killed before it wrote that: it must not train, and spend, again.
    lines = (out / "trials.jsonl").read_text().splitlines(keepends=True)
    (out / "trials.jsonl").write_text("".join(lines[:-1]))
    kept = (out / "trials" / "001" / "tail.safetensors").stat().st_mtime_ns
    assert outcome(search(bench, out, params).trials) == outcome(result.trials)
    assert (out / "trials" / "001" / "tail.safetensors").stat().st_mtime_ns == kept


def test_a_stopped_trial_counts_as_a_whole_one():
    record = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 30, "delta": 1e-3}
    whole = [Trial(i, {}, 1.0, (), state, 0.0, record) for i, state in enumerate(("complete", "pruned", "diverged"))]
    assert private_budget(whole)["epsilon"] == pytest.approx(composed_by_hand([record] * 3, 1e-3), rel=1e-6)


# ---- fitting a mix ---------------------------------------------------------------------------------------------------


def make_pool(space, seed=0):
    """Four members: two noisy views of a good state, one bad, one copy of the first."""
    rng = torch.Generator().manual_seed(seed)
    head = torch.randn(50, 16, generator=rng)
    truth = torch.randn(300, 16, generator=rng)
    targets = torch.multinomial((truth @ head.T).softmax(-1), 1, generator=rng)[:, 0]
    noisy = [truth + 0.7 * torch.randn(300, 16, generator=rng) for _ in range(2)]
    return Pool(space, torch.stack([*noisy, torch.randn(300, 16, generator=rng), noisy[0]]), head, targets)


@pytest.mark.parametrize("space", list(Space))
def test_fitting(space):
    pool = make_pool(space)
    mask = np.ones(300, bool)
    groups = np.arange(300) // 10
    mix, share = select_and_fit(pool, mask, groups, max_members=3)
    assert 0 <= share <= 1
    assert mix.sum() == pytest.approx(1)
    assert (mix >= 0).all() and mix[1] > 0.2 and mix[2] < 0.05
    assert pool.nll(mix).mean() < pool.single[:2].mean(axis=1).min()
    if space is Space.LOGITS:  # the convex fit is the best point of a grid
        grid = [np.array([a, 1 - a, 0, 0]) for a in np.linspace(0, 1, 41)]
        fitted = convex(pool, np.array([0.5, 0.5, 0, 0]), mask)
        assert pool.nll(fitted).mean() <= min(pool.nll(m).mean() for m in grid) + 1e-5


@pytest.mark.parametrize("space", list(Space))
def test_a_mix_of_equals_is_shrunk_to_uniform(space):
    """Two equally good members: what a fit on few documents prefers is their noise. A bad member is not given a share."""
    pool = make_pool(space, seed=3)
    groups, few = np.arange(300) // 10, np.arange(300) < 60
    uniform = np.array([0.5, 0.5, 0, 0])
    mix, share = shrink(pool, fit_mix(pool, uniform, few), few, groups)
    assert share > 0
    assert mix.tolist() == pytest.approx(((1 - share) * fit_mix(pool, uniform, few) + share * uniform).tolist())
    bad = np.array([0.5, 0, 0.5, 0])
    mix, share = shrink(pool, fit_mix(pool, bad, few), few, groups)
    assert share < 1 and mix[2] < 0.25
    alone, share = shrink(pool, np.array([0, 1.0, 0, 0]), few, groups)
    assert (alone.tolist(), share) == ([0, 1, 0, 0], 0.0)
    assert shrink(pool, uniform, few, np.zeros(300, int))[1] == 0.0  # one document


def test_em_is_the_best_point_of_the_simplex():
    pool = make_pool(Space.PROBS)
    fitted = em(pool.single[:2], np.array([0.9, 0.1]))
    best = min(pool.nll(np.array([a, 1 - a, 0, 0])).mean() for a in np.linspace(0, 1, 101))
    assert pool.nll(np.array([*fitted, 0, 0])).mean() <= best + 1e-6


def test_greedy_wants_what_a_member_adds():
    """Members 0 and 1 are good and alike, 2 is worse alone and different: the mix takes 0 and 2."""
    errors = np.array([[1.0, 0.0], [1.05, 0.0], [0.0, 1.4]])
    mix = greedy(3, lambda m: float(np.square(m @ errors).sum()), max_members=2, rounds=8, candidates=range(3))
    assert mix[0] > 0 and mix[2] > 0 and mix[1] == 0


def trial(number, value, state="complete", **params):
    return Trial(number, params, value, ((0, value),), state, 1.0)


def test_a_trial_is_judged_by_the_ensemble_that_it_would_complete():
    """Trials 0 and 1 are good and alike; 2 is worse alone but right where they are wrong; 3 was stopped."""
    losses = {0: np.tile([0.1, 3.0], 50), 1: np.tile([0.1, 3.1], 50), 2: np.tile([3.4, 0.1], 50)}
    trials = [trial(k, float(rows.mean()), layers=k + 1) for k, rows in losses.items()] + [
        trial(3, 0.2, "pruned", layers=1)
    ]
    settings = {"losses": losses, "members": 2}
    alone = trial_values(trials, objective="trial", cost=0.0, **settings)
    assert alone == [t.value for t in trials]
    together = trial_values(trials, objective="ensemble", cost=0.0, **settings)
    assert np.argmin(together) == 2 or together[0] == together[2]  # 0 and 2 complete each other
    assert together[2] < together[1] <= together[3] == max(together)
    assert together[2] == pytest.approx(mixed_loss(np.stack([losses[0], losses[2]])))
    priced = trial_values(trials, objective="ensemble", cost=0.5, **settings)
    assert np.subtract(priced, together).tolist() == pytest.approx([0.5, 1.0, 1.5, 0.5])


def test_the_choice_of_members_is_the_best_pair():
    rng = np.random.default_rng(0)
    rows = rng.exponential(1.0, (6, 400))
    pairs = {(i, j): mixed_loss(rows[[i, j]]) for i in range(6) for j in range(i)}
    found = chosen_members(rows, 2)
    assert mixed_loss(rows[found]) <= sorted(pairs.values())[2]  # greedy: among the best three of fifteen


@pytest.mark.slow
def test_a_search_over_adapters_by_the_ensemble(bench, tmp_path):
    """Choices of layers for adapters; losses of each trial at each validation token, which the objective is made of."""
    base = replace(BASE, method="lora", targets=("q_proj", "down_proj"))
    space = replace(SPACE, layers=(1, 2), rank=(2,))
    params = SearchParams(base, space, trials=5, startup=3, objective="ensemble", members=2)
    result = search(bench, tmp_path / "s", params)
    assert {t.state for t in result.trials} == {"complete"}
    assert {t.params["layers"] for t in result.trials} <= {1, 2}
    items = bench.load(TuneParams(layers=1, validation_examples=8, max_length=100), {"validation": 8}).parts[
        "validation"
    ]
    tokens = sum(item.encoded.num_targets for item in items)
    for t in result.trials:
        losses = np.load(tmp_path / "s" / "losses" / f"{t.number:03d}.npy")
        assert len(losses) == tokens and losses.mean() == pytest.approx(t.value, rel=1e-3)
    assert result.ensemble <= result.best.value + 1e-6
    assert outcome(search(bench, tmp_path / "s", params).trials) == outcome(result.trials)
    (tmp_path / "s" / "losses" / "001.npy").write_bytes(b"torn")
    with pytest.raises(BundleError, match=r"001\.npy' is damaged"):
        search(bench, tmp_path / "s", params)


def test_nested_cross_validation_and_bootstrap_are_honest():
    pool = make_pool(Space.PROBS)
    groups = np.arange(300) // 10
    mix, _ = select_and_fit(pool, np.ones(300, bool), groups, max_members=3)
    assert cross_validated(pool, groups, folds=4, max_members=3) >= pool.nll(mix).mean() - 1e-9
    interval = paired_bootstrap(pool.single[2], pool.single[0], groups)
    assert interval.low < interval.change < interval.high < 0
    same = paired_bootstrap(pool.single[0], pool.single[3], groups)
    assert (same.low, same.change, same.high) == (0, 0, 0)


@pytest.mark.slow
def test_what_cannot_be_fused(bench, tmp_path, tiny_model_dir):
    with pytest.raises(DataError, match="nothing to fuse"):
        fuse(bench, {}, tmp_path / "f")
    with pytest.raises(ConfigError, match="untuned model"):
        fuse(bench, {"base": tmp_path}, tmp_path / "f")
    linear = bench.config
    bench.config = replace(linear, logit_softcap=30.0)
    with pytest.raises(UnsupportedModelError, match="is not linear"):
        fuse(bench, {"a": tmp_path}, tmp_path / "f")
    bench.config = linear
    adapter = random_adapter(Decoder.from_dir(tiny_model_dir("llama")), ("q_proj",), 2, seed=0, scale=0.1)
    write_adapter(tmp_path / "a", linear, adapter, {"base": {"name": "x", "digest": "other"}})
    with pytest.raises(BundleError, match="trained on a base with digest"):
        fuse(bench, {"a": tmp_path / "a"}, tmp_path / "f")
