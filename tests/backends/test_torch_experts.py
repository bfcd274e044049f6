"""Mixtures of experts on the torch backend: the sum is that of the page, a row does not depend on the batch, members share the
experts."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend runs on torch")

from helpers.compare import relative_error  # noqa: E402
from helpers.models import EXPERTS, make_adapter, make_tail  # noqa: E402
from helpers.torch_backend import PROMPTS, ask, assert_same, config, ensemble, options, run, triton_options  # noqa: E402
from motet.export.bundle_writer import export_bundle  # noqa: E402
from motet.runtime.backends.torch.backend import TorchBackend  # noqa: E402
from motet.runtime.backends.torch.experts import run_experts  # noqa: E402
from motet.runtime.backends.torch.options import load_ops  # noqa: E402
from motet.runtime.backends.torch.weights import Placement, load_weights  # noqa: E402
from motet.runtime.checkpoints.decoder import Decoder  # noqa: E402
from motet.runtime.checkpoints.huggingface import read_config, read_weights  # noqa: E402
from motet.runtime.checkpoints.members.adapter import merge, read_adapter  # noqa: E402
from motet.runtime.checkpoints.members.tail import read_tail  # noqa: E402
from motet.runtime.model.bundle import Bundle  # noqa: E402


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, tiny_model_dir):
    """(family, bits) → bundle of the base alone."""
    root = tmp_path_factory.mktemp("experts")

    def make(family, bits):
        path = root / f"{family}-{bits}"
        return path if path.exists() else export_bundle(tiny_model_dir(family), path, bits=bits, graphs=False)

    return make


def layer_of(path, how):
    bundle = Bundle.load(path)
    weights = load_weights(bundle, Placement(how.device, how.dtype, how.keep_quantised))
    return bundle.config, weights.trunk[0]


@pytest.mark.parametrize("family", EXPERTS)
def test_the_sum_is_the_page_s(bundles, tiny_model_dir, family):
    """More rows of an expert than one matmul takes."""
    sizes, layer = layer_of(bundles(family, 32), options())
    page = Decoder.from_dir(tiny_model_dir(family)).double().model.layers[0].mlp
    x = torch.randn(300, sizes.hidden_size, generator=torch.Generator().manual_seed(0))
    found = run_experts(load_ops("eager"), layer, x, sizes, torch.float32)
    with torch.no_grad():
        assert relative_error(found[0], page(x.double())) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("family", "bits"), [("olmoe", 8), ("qwen3_moe", 4), ("qwen3_moe", 32)])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(bundles, family, bits):
    """With Triton's kernels, whatever other rows choose."""
    how = triton_options()
    sizes, layer = layer_of(bundles(family, bits), how)
    x = torch.randn(150, sizes.hidden_size, generator=torch.Generator().manual_seed(1)).to(how.device)
    together = run_experts(load_ops("triton"), layer, x, sizes, how.dtype)[0]
    for rows in ([0], [7, 149], list(range(20, 40))):
        alone = run_experts(load_ops("triton"), layer, x[rows].contiguous(), sizes, how.dtype)[0]
        assert torch.equal(alone, together[rows])


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERTS)
def test_triton_is_eager_and_batched_is_alone(bundles, family):
    requests = ask(PROMPTS[:2], [ensemble(base=1.0)] * 2, 2)
    path = bundles(family, 8)
    expected = run(path, options(), requests)
    assert_same(run(path, triton_options(), requests), expected)
    assert_same([run(path, options(), [request])[0] for request in requests], expected)
    assert_same(run(path, options(graphs=True), requests), expected)  # no step is captured


def test_members_with_tails_and_adapters(tiny_model_dir, tmp_path):
    model_dir = tiny_model_dir("olmoe")
    tail, adapter = (
        make_tail(model_dir, tmp_path / "tail", "tail", 1, 0.3),
        make_adapter(model_dir, tmp_path / "lora", 2),
    )
    path = export_bundle(model_dir, tmp_path / "b", tails={"a": tail}, loras={"b": adapter}, graphs=False, bits=32)
    backend = TorchBackend(Bundle.load(path), config(), options())
    sizes, base = read_config(model_dir), read_weights(model_dir)
    tokens = np.random.default_rng(0).integers(0, 300, 40).tolist()
    members = (base | read_tail(tail)[1], base | merge(base, read_adapter(adapter, sizes)[1]))
    for member, weights in enumerate(members):
        with torch.no_grad():
            expected = Decoder.from_weights(sizes, weights).double()(torch.tensor([tokens]))[0]
        assert relative_error(backend.score(tokens, member), expected) < 1e-4
