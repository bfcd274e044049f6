"""What the native CPU kernels refuse, and what does not cross their boundary: bad batches, mixes, sizes and weights."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.models import make_adapter
from helpers.native import ISAS, cpu_backend, model_config
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.export.bundle_writer import export_bundle
from motet.kernels.native.model import BLOCK_SIZE, NativeModel, PackedBatch, Weight
from motet.kernels.native.sampling import Sample, Sampling
from motet.kernels.native.structs import LinearKind, Vector
from motet.runtime.errors import BundleError, ConfigError, MotetError, UnavailableError

pytestmark = pytest.mark.native


def valid_step():
    """Two sequences of a one-member model: a chunk of 20 rows and a decode row at position 0."""
    tables = np.array([[0], [1]], np.int32)
    return {
        "token_ids": np.arange(21),
        "positions": np.array([*range(20), 0], np.int32),
        "slot_mapping": np.array([*range(20), BLOCK_SIZE]),
        "cu_seqlens": np.array([0, 20, 21], np.int32),
        "context_lens": np.array([20, 1], np.int32),
        "block_tables": tables,
        "trunk_cached": np.zeros(2, np.uint8),
        "members": None,
        "outputs": [(0, 19), (0, 20)],
        "freed_blocks": np.array([3], np.int32),
    }


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("token_ids", 3, 320, "token id 320 is not in"),
        ("token_ids", 3, -1, "token id -1"),
        ("positions", 3, 7, "row 3 is not at position 3"),
        ("slot_mapping", 5, 10**12, "row 5 has a slot outside"),
        ("slot_mapping", 5, -1, "row 5 has a slot outside"),
        ("cu_seqlens", 1, 0, "sequence 0 has no rows"),
        ("cu_seqlens", 1, 2**30, "sequence 0 has no rows"),
        ("cu_seqlens", 2, 20, "do not span"),
        ("context_lens", 0, 19, "allowed are 20 to"),
        ("context_lens", 0, 2**30, "allowed are 20 to"),
        ("block_tables", (0, 0), -1, "block -1"),
        ("block_tables", (0, 0), 2**30, "is not in the cache"),
        ("trunk_cached", 0, 1, "sequence 0 has no trunk that could be cached"),
        ("freed_blocks", 0, -1, "freed block -1 is not in the cache"),
        ("freed_blocks", 0, 2**30, "freed block 1073741824 is not in the cache"),
    ],
)
def test_a_bad_batch_is_refused_and_nothing_else_happens(bundle_of, field, index, value, message):
    model = cpu_backend(bundle_of("llama"))._model
    expected = model.step(PackedBatch(**valid_step()))
    bad = valid_step()
    bad[field][index] = value
    with pytest.raises(MotetError, match=message):
        model.step(PackedBatch(**bad))
    for outputs in ([(0, 21)], [(0, -1)], [(1, 0)], [(-1, 0)], [(0, 5), (0, 5)], [(0, 6), (0, 5)]):
        with pytest.raises(MotetError, match="output"):
            model.step(PackedBatch(**{**valid_step(), "outputs": outputs}))
    assert (model.step(PackedBatch(**valid_step())) == expected).all()


@pytest.mark.parametrize(
    ("terms", "sample_terms", "message"),
    [
        ([[(1, 1.0)]], [(0, 1.0)], "a hidden state that is not there"),
        ([[(-1, 1.0)]], [(0, 1.0)], "a hidden state that is not there"),
        ([[]], [(0, 1.0)], "row 0 has no terms"),
        ([[(0, float("inf"))]], [(0, 1.0)], "a coefficient of row 0 is not finite"),
        ([[(0, 1.0)]], [(1, 1.0)], "term 0 has row 1 of 1"),
        ([[(0, 1.0)]], [(0, float("nan"))], "not finite"),
    ],
)
def test_a_bad_mix_is_refused_before_anything_is_computed(bundle_of, terms, sample_terms, message):
    model = cached_model(bundle_of("llama"))
    batch = PackedBatch(**{**valid_step(), "outputs": [(0, 5)]})
    sampling = Sampling([Sample(sample_terms, temperature=0.0)], model.vocab_size)
    sampling.result.token_ids[:] = 7
    with pytest.raises(MotetError, match=message):
        model.generate(batch, terms, [1.0], [True], sampling.struct)
    assert sampling.result.token_ids.tolist() == [7]
    sampling = Sampling([Sample([(0, 1.0)], temperature=0.0)], model.vocab_size)
    for written in (1, -1):
        with pytest.raises(MotetError, match=f"written row {written} is not in 0…0"):
            model.generate(batch, [[(0, 1.0)]], [1.0], [True], sampling.struct, [written])
    for temperature in (0.0, -1.0, float("inf"), float("nan"), 1e-60):  # the last is 0 in float32
        with pytest.raises(MotetError, match="the temperature of row 0 is not a finite number above 0"):
            model.generate(batch, [[(0, 1.0)]], [temperature], [True], sampling.struct)
    tempered = model.generate(batch, [[(0, 1.0)]], [1.7], [False], sampling.struct, [0])
    logits = model.generate(batch, [[(0, 1.0)]], [1.0], [False], sampling.struct, [0])
    assert (logits == model.head(model.step(batch))).all()
    assert (tempered == logits / np.float32(1.7)).all()
    assert sampling.result.token_ids.tolist() == [logits[0].argmax()]


@pytest.fixture(scope="module")
def tails_bundle(tiny_model_dir, tmp_path_factory):
    """The base and an adapter tail over a trunk of two layers."""
    root, model_dir = tmp_path_factory.mktemp("tails"), tiny_model_dir("llama")
    lora = make_adapter(model_dir, root / "x", 1, layers=2)
    return export_bundle(model_dir, root / "b", tails={"base": None}, loras={"x": lora})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_batches_do_not_crash(bundle_of, tails_bundle, data):
    """Any integers in the arrays: a result or a typed error."""
    tails = data.draw(st.booleans())
    model = cached_model(tails_bundle if tails else bundle_of("llama"))
    batch = valid_step()
    if tails:
        batch["members"] = data.draw(st.lists(st.lists(st.integers(-1, 2), max_size=3), min_size=2, max_size=2))
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(st.sampled_from([name for name in batch if isinstance(batch[name], np.ndarray)]))
        flat = batch[field].reshape(-1)
        limit = np.iinfo(flat.dtype)
        low = max(-2, int(limit.min))
        value = data.draw(st.one_of(st.integers(low, 40), st.integers(int(limit.min), int(limit.max))))
        flat[data.draw(st.integers(0, flat.size - 1))] = value
    batch["outputs"] = data.draw(st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 25)), max_size=4))
    try:
        hidden = model.step(PackedBatch(**batch))
    except MotetError:
        return
    assert hidden.shape == (len(batch["outputs"]), 64)


_models = {}


def cached_model(path):
    if path not in _models:
        _models[path] = cpu_backend(path)._model
    return _models[path]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [slice(7, 8), slice(None)])
def test_a_nan_stays_in_its_row(bundle_of, isa, columns):
    model = cpu_backend(bundle_of("llama"), isa=isa)._model
    hidden = np.ones((3, 64), np.float32)
    hidden[1, columns] = np.nan
    logits = model.head(hidden)
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[[0, 2]]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"head_size": 17}, "head_size is 17"),
        ({"head_size": 512}, "head_size is 512"),
        ({"hidden_size": 65}, "hidden_size is 65"),
        ({"intermediate_size": 100}, "intermediate_size is 100"),
        ({"num_kv_heads": 3}, "no multiple"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"split_layer": 2}, "split_layer"),
        ({"num_members": 2}, "num_tails is 0 with 2 members"),
        ({"split_layer": 0}, "layers from split_layer on, and no tails"),
        ({"threads": 10_000}, "threads"),
    ],
)
def test_sizes_that_the_kernels_do_not_have(changes, message):
    with pytest.raises(UnavailableError, match=message):
        NativeModel(model_config(**changes))


def test_a_member_has_a_tail_that_exists_and_updates_only_of_it():
    with pytest.raises(UnavailableError, match="the tail of member 1 is 2, there are 2"):
        NativeModel(model_config(num_members=3), (0, 2, 0))
    model = NativeModel(model_config(num_members=2, split_layer=1), (0, 0))
    with pytest.raises(BundleError, match="layer 0 is below split_layer 1, and members share it"):
        model.set_adapter(LinearKind.QKV, 0, 0, np.ones((2, 64)), np.ones((128, 2)), "adapter")


def test_weights_that_do_not_fit():
    model = NativeModel(model_config())

    def weight(rows=128, columns=64, bits=8, group=32, groups=2, **changes):
        values = np.zeros((rows, groups, group * bits // 8), np.uint8)
        fields = {"values": values, "scales": np.ones((rows, groups), np.float32)} | changes
        return Weight(rows, columns, bits, group, **fields)

    bad = {
        "the model needs": weight(rows=100),
        "bits must be": weight(bits=2),
        "group_size must be": weight(group=48, groups=1),
        "does not divide": weight(group=128, groups=0),
        "its values are": weight(groups=3),
        "its scales are": weight(scales=np.ones((128, 3), np.float32)),
        "are missing": weight(bits=4),
        "needs values or dense": weight(values=None, scales=None),
    }
    for message, tensor in bad.items():
        with pytest.raises(BundleError, match=f"qkv.*{message}"):
            model.set_linear(LinearKind.QKV, 0, tensor, "qkv")
    for layer in (-1, 1):
        with pytest.raises(BundleError, match="no layer"):
            model.set_linear(LinearKind.QKV, layer, weight(), "qkv")
    with pytest.raises(BundleError, match="needs 64"):
        model.set_vector(Vector.ATTENTION_NORM, 0, np.ones(63, np.float32), "norm")
    with pytest.raises(BundleError, match="an adapter comes after"):
        model.set_adapter(LinearKind.QKV, 0, 0, np.ones((2, 64)), np.ones((128, 2)), "adapter")
    model.set_linear(LinearKind.QKV, 0, weight(), "qkv")
    for a, b in (
        (np.ones((2, 63)), np.ones((128, 2))),
        (np.ones((2, 64)), np.ones((127, 2))),
        (np.ones((2, 64)), np.ones((128, 3))),
    ):
        with pytest.raises(BundleError, match="adapter"):
            model.set_adapter(LinearKind.QKV, 0, 0, a, b, "adapter")
    with pytest.raises(BundleError, match="a low-rank update holds NaN or infinity"):
        model.set_adapter(LinearKind.QKV, 0, 0, np.full((2, 64), np.nan), np.ones((128, 2)), "adapter")
    with pytest.raises(BundleError, match="is missing"):
        model.ready()
    with pytest.raises(MotetError, match="not ready"):
        model.head(np.ones((1, 64), np.float32))


def test_scales_that_do_not_match_their_values(bundle_of):
    """A bundle whose arrays disagree is refused before a byte of it is read."""
    scales = np.ones((128, 1), np.float32)
    weight = Weight(128, 64, 8, 32, values=np.zeros((128, 2, 32), np.uint8), scales=scales)
    with pytest.raises(BundleError, match="scales"):
        NativeModel(model_config()).set_linear(LinearKind.QKV, 0, weight, "qkv")


def test_a_window_of_nothing_is_refused(bundle_of):
    with pytest.raises(BundleError, match="the window is 0"):
        cpu_backend(bundle_of("llama"))._model.set_window(0, 0)


def test_a_score_longer_than_the_cache(bundle_of):
    with pytest.raises(ConfigError, match="blocks of KV cache"):
        cpu_backend(bundle_of("llama"), seqs=1, length=64).score(list(range(65)), 0)
