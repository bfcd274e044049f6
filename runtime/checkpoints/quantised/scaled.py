"""Checkpoints whose weights are small numbers times scales: compressed-tensors (llm-compressor, vLLM), and the FP8 of
transformers.

    pack-quantized              .weight_packed int32 [out, in · bits / 32], .weight_shape, zero points packed along the outputs
    int-, float-, naive-…       .weight int8 or float8 [out, in]
    fp8 of transformers         .weight float8 [out, in] with .weight_scale_inv

Scales (`weight_scale`) and zero points are one for all, one an output [out, 1], one a group of inputs [out, groups], or one a
block of both. Activations that are rounded while the model runs (`dynamic`) are: Motet rounds them to 8 bits by groups itself, or
not at all. Scales of activations that were measured before are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModelError, shown
from .method import Settings, Shapes, check, check_groups, option, unpack

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_STRATEGIES = ("tensor", "channel", "group", "block")


class CompressedTensors:
    def __init__(self, settings: Settings) -> None:
        """Raises `UnsupportedModelError` for options that are not computed."""
        option(settings, "format", _FORMATS)
        option(settings, "quantization_status", ("compressed", "frozen", None))
        sparsity = settings.get("sparsity_config") or {}
        option(sparsity, "format", ("dense",))
        for name in ("kv_cache_scheme", "transform_config"):
            option({name: settings.get(name) or None}, name, (None,))
        self.schemes: list[tuple[str | re.Pattern[str], Mapping[str, Any]]] = []
        for group in settings.get("config_groups", {}).values():
            weights = group.get("weights")
            for name in ("input_activations", "output_activations"):
                if group.get(name) and not group[name].get("dynamic"):
                    raise UnsupportedModelError(
                        f"quantization_config has measured scales of {name}; they are not computed"
                    )
            if weights:
                option({"format": group.get("format")}, "format", (None, *_FORMATS))
                _check_weights(weights)
                self.schemes += [(_target(target), weights) for target in sorted(group.get("targets", []))]

    def owner(self, name: str) -> str | None:
        module, _, part = name.rpartition(".")
        return f"{module}.weight" if part in _PARTS else None

    def shape(self, weight: str, shapes: Shapes, read: Callable[[str], Tensor]) -> tuple[int, ...]:
        if weight in shapes:
            check(f"{weight}_packed" not in shapes, "it is stored twice, packed and not")
            return shapes[weight]
        out, count = read(f"{weight}_shape").tolist()
        return int(out), int(count)

    def widen(self, weight: str, parts: Mapping[str, Tensor]) -> Tensor:
        settings = self._of(weight.removesuffix(".weight"))
        scale, zero, index = (parts.get(f"{weight}_{name}") for name in ("scale", "zero_point", "g_idx"))
        bits = settings["num_bits"]
        check(scale is not None, "there is no weight_scale")
        assert scale is not None
        if weight in parts:
            values = parts[weight]
        else:
            out, count = (int(size) for size in parts[f"{weight}_shape"])
            values = _unpacked(parts[f"{weight}_packed"], bits, 1, count)
            check(values.shape == (out, count), f"weight_packed has {tuple(values.shape)} numbers of {(out, count)}")
            if zero is not None and zero.dtype == torch.int32:
                zero = _unpacked(zero, bits, 0, out)
        check(settings.get("symmetric", True) or zero is not None, "there is no weight_zero_point")
        if index is not None and bool((index == -1).all()):  # no order
            index = None
        strategy = settings.get("strategy")
        if strategy == "group":
            check_groups(values.shape[1], scale.shape[-1], settings.get("group_size"))
        return scaled(values, scale, zero, _block(settings["block_structure"]) if strategy == "block" else None, index)

    def _of(self, module: str) -> Mapping[str, Any]:
        """The settings of a module's weights: those of a group that names it, else of a pattern, else of all linear layers."""
        named = [weights for target, weights in self.schemes if target == module]
        matched = [weights for target, weights in self.schemes if not isinstance(target, str) and target.match(module)]
        every = [weights for target, weights in self.schemes if target == "Linear"]
        check(bool(named or matched or every), "it is quantised, and no group of quantization_config has it")
        return (named or matched or every)[0]


def _target(target: str) -> str | re.Pattern[str]:
    try:
        return re.compile(target[3:]) if target.startswith("re:") else target
    except re.error as error:
        raise UnsupportedModelError(
            f"quantization_config has the target '{target}', which is no pattern: {error}"
        ) from None


def _unpacked(words: Tensor, bits: int, dim: int, count: int) -> Tensor:
    """`count` signed numbers along `dim`. Older releases leave gaps where a word has no room for one more number."""
    dense, gapped = -(-count * bits // 32), -(-count // (32 // bits))
    check(32 % bits == 0 or dense != gapped, f"{count} numbers of {bits} bits may be packed with gaps or without")
    check(words.shape[dim] == dense, f"{words.shape[dim]} words for {count} numbers of {bits} bits")
    numbers: Tensor = unpack(words, bits, dim).narrow(dim, 0, count) - 2 ** (bits - 1)
    return numbers


def _block(sizes: Any) -> list[int]:
    """[outputs, inputs] of a block, which may be written as "128x128"."""
    found = [int(size) for size in sizes.split("x")] if isinstance(sizes, str) else list(sizes)
    check(len(found) == 2 and min(found) > 0, f"block_structure={sizes!r}")
    return found


def _check_weights(weights: Settings) -> None:
    kind = option(weights, "type", ("int", "float"))
    option(weights, "num_bits", (8,) if kind == "float" else tuple(range(8, 0, -1)))
    option({"strategy": weights.get("strategy") or "tensor"}, "strategy", _STRATEGIES)
    option({"scale_dtype": "uint8" if "uint8" in str(weights.get("scale_dtype")) else None}, "scale_dtype", (None,))
    option({"dynamic": weights.get("dynamic") or False}, "dynamic", (False,))


class Fp8:
    def __init__(self, settings: Settings) -> None:
        """Raises `UnsupportedModelError` for options that are not computed."""
        option(settings, "activation_scheme", ("dynamic",))
        option({"fmt": str(settings.get("fmt", "e4m3")).lower()}, "fmt", ("e4m3", "float8_e4m3fn"))
        self.block = settings.get("weight_block_size", [128, 128])
        if self.block is not None and not (
            isinstance(self.block, list) and len(self.block) == 2 and all(type(n) is int and n > 0 for n in self.block)
        ):
            raise UnsupportedModelError(f"quantization_config has weight_block_size={shown(self.block)}")

    def owner(self, name: str) -> str | None:
        """`weight_scale` is AutoFP8's, one for a weight or an output."""
        return next(
            (name.removesuffix(end) for end in ("_scale_inv", "_scale") if name.endswith(f".weight{end}")), None
        )

    def shape(self, weight: str, shapes: Shapes, read: Callable[[str], Tensor]) -> tuple[int, ...]:
        check(weight in shapes, "its scales are there without the weight")
        return shapes[weight]

    def widen(self, weight: str, parts: Mapping[str, Tensor]) -> Tensor:
        inverse, plain = (parts.get(f"{weight}_{name}") for name in ("scale_inv", "scale"))
        check((inverse is None) != (plain is None), "it has two kinds of scales")
        if inverse is None:
            assert plain is not None
            return scaled(parts[weight], plain, None, None, None)
        return scaled(parts[weight], inverse, None, self.block, None)


def scaled(values: Tensor, scale: Tensor, zero: Tensor | None, block: list[int] | None, index: Tensor | None) -> Tensor:
    """(values − zero) · scale in float32, values [out, in]. `block`: outputs and inputs that share a scale; None: as many as
    the shape of the scales says. `index` [in]: the group of each input. Raises `ValueError` if they do not fit."""
    check(values.ndim == 2, f"a weight of {values.ndim} dimensions")
    check(values.dtype in (torch.int8, torch.int32, torch.float8_e4m3fn), f"a quantised weight of {values.dtype}")
    check(scale.is_floating_point(), f"scales of {scale.dtype}")
    scale = scale.float()

    def spread(x: Tensor) -> Tensor:
        x = x.reshape(1, 1) if x.numel() == 1 else x[:, None] if x.ndim == 1 else x
        check(x.ndim == 2, f"scales of {x.ndim} dimensions")
        for dim, size in enumerate(values.shape):
            count = x.shape[dim]
            if dim == 1 and index is not None:
                check(index.shape == (size,) and bool(((index >= 0) & (index < count)).all()), "g_idx does not fit")
                x = x[:, index.long()]
                continue
            each = block[dim] if block else size // max(count, 1)
            check(-(-size // max(each, 1)) == count, f"{count} scales for {size} in steps of {each}")
            x = x.repeat_interleave(each, dim).narrow(dim, 0, size) if count > 1 else x
        return x

    number = values.float()
    if zero is not None:
        number = number - spread(zero.float())
    wide: Tensor = number * spread(scale)
    return wide
