"""How a bundle holds tensors: whose tensor it is, and the arithmetic of 4-bit groups."""

from __future__ import annotations

import numpy as np
import pytest
from motet.export.quantisation.groups import dequantise, quantise
from motet.runtime.errors import BundleError
from motet.runtime.model.stored import resolve, stored_weight

WEIGHT = "model.layers.0.mlp.up_proj.weight"


def stored(weight, bits, group_size):
    found = quantise(weight, bits, group_size)
    arrays = {"values": found.values, "scales": found.scales, "minima": found.minima}
    return {f"{WEIGHT}.{part}": array for part, array in arrays.items() if array is not None}


@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("groups", [1, 3, 16, 17, 70])
@pytest.mark.parametrize("bits", [4, 8])
def test_sizes_are_found_from_the_arrays(bits, groups, group_size):
    columns = groups * group_size
    weight = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
    tensors = stored(weight, bits, group_size)
    found = stored_weight(tensors, WEIGHT)
    assert (found.rows, found.columns, found.bits, found.group_size, found.groups) == (
        5,
        columns,
        bits,
        group_size,
        groups,
    )
    half_step = np.repeat(tensors[found.scales].astype(np.float32), group_size, axis=1) / 2
    error = np.abs(dequantise(quantise(weight, bits, group_size)) - weight)
    assert (error <= half_step * 1.02).all()  # scales and minima are rounded to 11 bits


def test_a_members_own_tensor_goes_before_the_bases():
    tensors = {WEIGHT, f"members.a.{WEIGHT}", f"members.b.{WEIGHT}.values"}
    assert resolve(tensors, WEIGHT, None) == WEIGHT
    assert resolve(tensors, WEIGHT, "a") == f"members.a.{WEIGHT}"
    assert resolve(tensors, WEIGHT, "b") == f"members.b.{WEIGHT}"
    assert resolve(tensors, WEIGHT, "c") == WEIGHT


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "no tensor"),
        ({f"{WEIGHT}.values": (4, 2, 32)}, "no tensor"),
        ({f"{WEIGHT}.values": (4, 64), f"{WEIGHT}.scales": (4, 2)}, r"values' are \[4, 64\]"),
        ({WEIGHT: (4,)}, "1 dimensions"),
    ],
)
def test_a_weight_that_is_not_whole(shapes, message):
    with pytest.raises(BundleError, match=message):
        stored_weight({name: np.zeros(shape) for name, shape in shapes.items()}, WEIGHT)
