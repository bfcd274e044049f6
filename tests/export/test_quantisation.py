"""Methods of quantisation against slow, exact references, and what calibration text says of a model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.compare import relative_error
from helpers.models import FAMILIES
from motet.export.quantisation.allocate import Choice, allocate, cheapest
from motet.export.quantisation.equalise import equalise
from motet.export.quantisation.gptq import gptq
from motet.export.quantisation.groups import Scheme, affine, dequantise, nearest, quantise
from motet.export.quantisation.method import Method, Target
from motet.export.quantisation.quantiser import Quantiser, choose_scales
from motet.export.quantisation.search import search
from motet.export.quantisation.statistics import Statistics, gather
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.errors import ConfigError
from motet.runtime.model.layout import EMBEDDING, decoder_layout

CHUNKS = [np.random.default_rng(seed).integers(0, 320, 128).tolist() for seed in range(3)]


def problem(rows, columns, seed=0):
    """A weight, and the moments of inputs whose channels differ in size and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing * torch.logspace(-1, 1, columns)
    return weight, inputs.t() @ inputs / len(inputs)


def cost(change, moments):
    return float(((change.double() @ moments.double()) * change.double()).sum())


def slow_gptq(weight, moments, scales, minima, group):
    """A column at a time: the weights of the columns that are left take the values that are best for all inputs, given what is
    rounded already. Exact, by solving the normal equations anew for each column."""
    damped = moments.double() + torch.eye(len(moments)).double() * 0.01 * float(moments.diagonal().mean())
    order = moments.diagonal().argsort(descending=True, stable=True).tolist()
    weight, values, rounded = weight.double(), torch.empty_like(weight), weight.double().clone()
    rest = weight.clone()
    for place, column in enumerate(order):
        scale, minimum = scales[:, column // group].double(), minima[:, column // group].double()
        values[:, column] = ((rest[:, column] - minimum) / scale).round().clamp(0, 15)
        rounded[:, column] = values[:, column] * scale + minimum
        done, left = order[: place + 1], order[place + 1 :]
        if (
            left
        ):  # minimise Σ over inputs of ((rounded - weight) x)², where `rounded` is free in the columns that are left
            wanted = (weight - rounded)[:, done] @ damped[done][:, left]
            rest[:, left] = weight[:, left] + torch.linalg.solve(damped[left][:, left], wanted.t()).t()
    return values


@pytest.mark.parametrize(("columns", "group"), [(32, 16), (96, 32)])
def test_gptq_is_the_exact_solution_column_by_column(columns, group):
    weight, moments = problem(6, columns)
    scales, minima = search(weight, moments.diagonal(), group)
    found, expected = gptq(weight, moments, scales, minima), slow_gptq(weight, moments, scales, minima, group)
    assert (found != expected).float().mean() < 0.01  # ties that float32 decides otherwise
    assert cost(parts(found, scales, minima) - weight, moments) < 1.02 * cost(
        parts(expected, scales, minima) - weight, moments
    )


def parts(values, scales, minima):
    """The weight that values [N, K] stand for."""
    groups = values.float().unflatten(1, (scales.shape[1], -1))
    return (groups * scales[..., None] + minima[..., None]).flatten(1)


def test_each_method_costs_less_than_the_one_before():
    weight, moments = problem(64, 128)
    scales, minima = search(weight, moments.diagonal(), 32)
    stored = affine(
        gptq(weight, moments, scales, minima).unflatten(1, (4, -1)).byte().numpy(), scales.numpy(), minima.numpy()
    )
    weights = [
        dequantise(quantise(weight.numpy(), 4, 32)),
        dequantise(nearest(weight.numpy(), scales.numpy(), minima.numpy())),
        dequantise(stored),
    ]
    rounding, searching, making_up = (cost(torch.from_numpy(found) - weight, moments) for found in weights)
    assert searching < 0.9 * rounding
    assert making_up < 0.7 * searching


def test_the_search_is_near_the_best_of_a_dense_grid():
    """Of single groups: the best of 120 × 120 pairs of scale and minimum."""
    generator = torch.Generator().manual_seed(2)
    weight, importance = torch.randn(12, 16, generator=generator), torch.rand(16, generator=generator) + 0.05
    scales, minima = search(weight, importance, 16)
    found = (
        (parts(((weight - minima) / scales).round().clamp(0, 15), scales, minima) - weight).square() * importance
    ).sum(1)
    low, width = weight.amin(1), weight.amax(1) - weight.amin(1)
    best = torch.full((12,), float("inf"))
    for shrink, shift in itertools.product(np.linspace(0.6, 1.05, 120), np.linspace(-0.1, 0.3, 120)):
        scale, minimum = (width * shrink / 15)[:, None], (low + shift * width)[:, None]
        change = ((weight - minimum) / scale).round().clamp(0, 15) * scale + minimum - weight
        best = torch.minimum(best, (change.square() * importance).sum(1))
    assert (found <= 2 * best + 1e-6).all()
    assert found.sum() <= 1.15 * best.sum()


@pytest.mark.parametrize("weight", [torch.full((3, 32), 0.7), torch.zeros(3, 32), torch.full((3, 32), 1e-30)])
def test_groups_without_any_spread(weight):
    scales, minima = search(weight, torch.ones(32), 16)
    assert torch.allclose(
        torch.from_numpy(dequantise(nearest(weight.numpy(), scales.numpy(), minima.numpy()))), weight, rtol=1e-3
    )


def choices(rng, count):
    """Weights with a few schemes each; more bytes never cost more."""
    result = {}
    for index in range(count):
        sizes, errors = np.sort(rng.integers(1, 60, 4)), np.sort(rng.random(4))[::-1]
        result[f"w{index}"] = [Choice(Scheme(4, 32), int(n), float(e)) for n, e in zip(sizes, errors, strict=True)]
    return result


@pytest.mark.parametrize("seed", range(8))
def test_allocation_against_all_combinations(seed):
    """Within the budget; never worse than the best combination that has the largest step of any weight less to spend."""
    rng = np.random.default_rng(seed)
    own = choices(rng, 6)
    sizes = np.array([[c.num_bytes for c in combination] for combination in itertools.product(*own.values())]).sum(1)
    errors = np.array([[c.error for c in combination] for combination in itertools.product(*own.values())]).sum(1)
    for budget in rng.integers(sizes.min(), sizes.max() + 1, 10):
        chosen = allocate(own, int(budget)).values()
        assert sum(c.num_bytes for c in chosen) <= budget
        found = sum(c.error for c in chosen)
        assert found >= errors[sizes <= budget].min() - 1e-12
        step = max(abs(a.num_bytes - b.num_bytes) for o in own.values() for a, b in itertools.pairwise(o))
        fitting = errors[sizes <= budget - step]
        assert not len(fitting) or found <= fitting.min() + 1e-12
    for limit in rng.uniform(errors.min(), errors.max(), 5):
        chosen = cheapest(own, float(limit)).values()
        assert sum(c.error for c in chosen) <= limit + 1e-12
        assert sum(c.num_bytes for c in chosen) <= sizes[errors <= limit].min() + step


def test_targets_that_cannot_be_reached():
    own = choices(np.random.default_rng(0), 3)
    least = sum(min(c.num_bytes for c in o) for o in own.values())
    with pytest.raises(
        ConfigError, match=f"the smallest that these weights can be is {least:,} bytes, and the target is 1"
    ):
        allocate(own, 1)
    with pytest.raises(ConfigError, match=r"the least KL .* and the target is 1e-09"):
        cheapest(own, 1e-9)


@pytest.mark.parametrize(
    "targets", [{}, {"bits": 4.5, "kl": 0.1}, {"bits": 0.0}, {"megabytes": float("inf")}, {"kl": -1.0}]
)
def test_targets_that_are_none(targets):
    with pytest.raises(ConfigError, match="a target is"):
        Target(**targets)


# ---- what calibration text says --------------------------------------------------------------------------------------


def statistics_of(model_dir, path, chunks=CHUNKS):
    config, weights = read_config(model_dir), read_weights(model_dir)
    gather(config, weights, chunks, path)
    return config, weights, Statistics(path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "olmoe"])
def test_statistics_are_those_of_the_whole_model(tiny_model_dir, tmp_path, family):
    """Inputs, outputs and gradients of the decoder as one graph, with the targets that the pass draws."""
    config, weights, statistics = statistics_of(tiny_model_dir(family), tmp_path / "s")
    decoder = Decoder.from_weights(config, weights)
    layout, inputs, outputs = decoder_layout(config), {}, {}
    for linear in layout.linears:
        for part in linear.parts:

            def keep(_module, given, output, name=part.name):
                output.retain_grad()
                inputs.setdefault(name, []).append(given[0].detach().flatten(0, -2))
                outputs.setdefault(name, []).append(output)

            decoder.get_submodule(part.name).register_forward_hook(keep)
    generator, states = torch.Generator().manual_seed(0), []
    for chunk in CHUNKS:
        logits = decoder(torch.tensor([chunk]))[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        states.append(logits.detach().softmax(-1))
    for linear in layout.linears:  # every expert runs; its gradients count over its own tokens
        rows = torch.cat(inputs[linear.parts[0].name]).double()
        moments = torch.from_numpy(statistics.moments(f"{linear.name}.weight"))
        assert relative_error(moments, rows.t() @ rows / sum(map(len, CHUNKS))) < 1e-4
        found = torch.from_numpy(statistics.sensitivity(f"{linear.name}.weight"))
        gradients = [torch.cat([out.grad.flatten(0, -2) for out in outputs[part.name]]) for part in linear.parts]
        assert relative_error(found, torch.cat(gradients, 1).square().mean(0)) < 1e-2
    shares = torch.cat(states)
    expected = (shares * (1 - shares)).mean(0) * config.logit_scale**2
    assert relative_error(torch.from_numpy(statistics.sensitivity(layout.head)), expected) < 1e-3
    assert statistics.influence.shape == (config.num_layers,)
    assert (statistics.influence > 0).all()


def test_expected_kl_is_the_kl(tiny_model_dir, tmp_path):
    """Small random changes of every weight, against the divergence that the model then has on the text."""
    config, weights, statistics = statistics_of(tiny_model_dir("llama"), tmp_path / "s")
    layout, generator = decoder_layout(config), torch.Generator().manual_seed(0)
    judge, changed, expected = Quantiser({}, Method.SEARCH, statistics=statistics), dict(weights), 0.0
    for linear in layout.linears:
        names = [f"{part.name}.weight" for part in linear.parts]
        changes = [0.01 * torch.randn(weights[name].shape, generator=generator) * weights[name].std() for name in names]
        changed |= {name: weights[name] + change for name, change in zip(names, changes, strict=True)}
        expected += judge.expected_kl(f"{linear.name}.weight", torch.cat(changes).numpy())
    for name in dict.fromkeys((EMBEDDING, layout.head)):
        change = 0.01 * torch.randn(weights[name].shape, generator=generator) * weights[name].std()
        changed[name] = weights[name] + change
        expected += judge.expected_kl(name, change.numpy())
    with torch.no_grad():
        own, other = (Decoder.from_weights(config, w).double() for w in (weights, changed))
        rows = [
            (own(torch.tensor([c]))[0].log_softmax(-1), other(torch.tensor([c]))[0].log_softmax(-1)) for c in CHUNKS
        ]
    found = float(np.mean([float((p.exp() * (p - q)).sum(-1).mean()) for p, q in rows]))
    assert 0.7 < expected / found < 1.4


@pytest.mark.parametrize("family", FAMILIES)
def test_sharpening_is_the_same_function(tiny_model_dir, tmp_path, family):
    config, weights, statistics = statistics_of(tiny_model_dir(family), tmp_path / "s")
    layout = decoder_layout(config)
    plan = {f"{linear.name}.weight": Scheme(4, 32) for linear in layout.linears}
    quantiser = Quantiser(plan, Method.AWQ, statistics=statistics)
    rms = {one.name: statistics.rms(f"{one.name}.weight") for one in layout.linears if one.source is not None}
    choose_scales(quantiser, layout, weights, rms)
    arrays = equalise(layout, {name: tensor.numpy() for name, tensor in weights.items()}, quantiser.scales)
    changed = {name: torch.from_numpy(array) for name, array in arrays.items()}
    token_ids = torch.arange(40)[None]
    with torch.no_grad():
        before, after = (Decoder.from_weights(config, own).double()(token_ids) for own in (weights, changed))
    assert relative_error(after, before) < 1e-5
    if family != "falcon":  # whose layers have no channels that can be scaled
        assert any(np.abs(own - 1).max() > 0.01 for own in quantiser.scales.values())


def test_what_rounding_costs_does_not_change_with_the_scales(tiny_model_dir, tmp_path):
    """The same change of the function, in scaled channels and rows."""
    config, _, statistics = statistics_of(tiny_model_dir("llama"), tmp_path / "s")
    layout = decoder_layout(config)
    up, down = layout.layers[1].mlp.up, layout.layers[1].mlp.down
    generator = np.random.default_rng(0)
    scales = {
        up.name: np.exp(generator.standard_normal(up.columns)),
        down.name: np.exp(generator.standard_normal(down.columns)),
    }
    scales = {name: own.astype(np.float32) for name, own in scales.items()}
    rows = np.concatenate([np.ones(down.columns, np.float32), scales[down.name]])
    plain = Quantiser({}, Method.SEARCH, statistics=statistics)
    scaled = Quantiser({}, Method.SEARCH, scales, {f"{up.name}.weight": rows}, statistics)
    change = generator.standard_normal((up.rows, up.columns)).astype(np.float32)
    name = f"{up.name}.weight"
    there = scaled.expected_kl(name, change * scales[up.name] / rows[:, None])
    assert there == pytest.approx(plain.expected_kl(name, change), rel=1e-3)
    change = generator.standard_normal((down.rows, down.columns)).astype(np.float32)
    name = f"{down.name}.weight"
    assert scaled.expected_kl(name, change * scales[down.name]) == pytest.approx(
        plain.expected_kl(name, change), rel=1e-3
    )


def test_a_seed_draws_other_targets(tiny_model_dir, tmp_path):
    config, weights, one = statistics_of(tiny_model_dir("llama"), tmp_path / "one")
    gather(config, weights, CHUNKS, tmp_path / "other", seed=1)
    other, name = Statistics(tmp_path / "other"), "model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(one.moments(name), other.moments(name))
    assert not np.array_equal(one.sensitivity(name), other.sensitivity(name))
