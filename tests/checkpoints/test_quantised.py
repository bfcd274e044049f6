"""Checkpoints of GPTQ, AWQ, compressed-tensors and FP8: what their tools store is what is read; anything else is refused by name.

Packers here are written from the tools' descriptions, number by number; those of compressed-tensors are its own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from motet.export.bundle_writer import export_bundle
from motet.runtime.checkpoints.huggingface import checkpoint_digest, read_config, read_weights
from motet.runtime.checkpoints.quantised.method import unpack
from motet.runtime.errors import BundleError, UnsupportedModelError
from motet.runtime.model.bundle import Bundle
from safetensors.torch import load_file, save_file

GROUP = 32


def pack(numbers, bits):
    """Words of 32 bits, as signed, of whole numbers: a stream of bits, the lowest first."""
    stream = sum(int(number) << (bits * index) for index, number in enumerate(numbers))
    count = -(-len(numbers) * bits // 32)
    words = [stream >> 32 * index & 0xFFFFFFFF for index in range(count)]
    return torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32)


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_of_any_width(bits):
    numbers = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    words = torch.stack([pack(row, bits) for row in numbers])
    assert torch.equal(unpack(words, bits, 1), numbers.int())
    assert torch.equal(unpack(words.t().contiguous(), bits, 0), numbers.t().int())


def affine(weight, bits, rng):
    """Steps [out, in], scales and zero points [out, groups], the group of each input, and the weight that they make."""
    out, count = weight.shape
    groups = count // GROUP
    index = torch.arange(count) // GROUP
    index = index[torch.randperm(count, generator=rng)]
    scales = (torch.rand(out, groups, generator=rng) * 0.02 + 0.005).half().float()
    zeros = torch.randint(1, 2**bits, (out, groups), generator=rng)
    steps = torch.randint(0, 2**bits, (out, count), generator=rng)
    return steps, scales, zeros, index, (steps - zeros[:, index]) * scales[:, index]


def gptq(name, weight, bits, rng, *, version=1):
    steps, scales, zeros, index, wide = affine(weight, bits, rng)
    stored = zeros - 1 if version == 1 else zeros
    module = name.removesuffix("weight")
    parts = {
        "qweight": torch.stack([pack(row, bits) for row in steps], 1),
        "qzeros": torch.stack([pack(column, bits) for column in stored.t()]),
        "scales": scales.t().half(),
        "g_idx": index.int(),
    }
    return {module + part: tensor.contiguous() for part, tensor in parts.items()}, wide


def awq(name, weight, bits, rng):
    steps, scales, zeros, _, _ = affine(weight, bits, rng)
    index = torch.arange(weight.shape[1]) // GROUP
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(outputs):  # [rows, out]
        return torch.stack([pack([v for at in range(0, len(r), 8) for v in r[at : at + 8][order]], 4) for r in outputs])

    module = name.removesuffix("weight")
    parts = {"qweight": words(steps.t()), "qzeros": words(zeros.t()), "scales": scales.t().half()}
    wide = (steps - zeros[:, index]) * scales[:, index]
    return {module + part: tensor.contiguous() for part, tensor in parts.items()}, wide


def write(source, out, settings, quantise, keep=()):
    """A model directory whose layers' weights are stored as `quantise(name, weight)` says, and all weights as they are to be
    read."""
    shutil.copytree(source, out)
    stored = load_file(out / "model.safetensors")
    tensors, expected = {}, {}
    for name, tensor in stored.items():
        if name.endswith("_proj.weight") and not any(word in name for word in keep):
            own, expected[name] = quantise(name, tensor)
            tensors |= own
        else:
            tensors[name] = expected[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return expected


def check(out, expected, limit=1e-6):
    found = read_weights(out)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor.float()).abs().max() <= limit * tensor.float().abs().max(), name


@pytest.mark.parametrize(("bits", "version"), [(4, 1), (4, 2), (8, 1), (3, 1), (2, 2)])
def test_gptq(tiny_model_dir, tmp_path, bits, version):
    """Inputs in any group, as activation order leaves them. Layers have biases of zeros that the family lacks."""
    rng = torch.Generator().manual_seed(bits)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": True, "sym": False}
    settings |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    out = tmp_path / "m"

    def with_bias(name, weight):
        parts, wide = gptq(name, weight, bits, rng, version=version)
        return parts | {name.removesuffix("weight") + "bias": torch.zeros(len(weight))}, wide

    check(out, write(tiny_model_dir("llama"), out, settings, with_bias))


def test_gptq_with_settings_in_a_file_of_their_own(tiny_model_dir, tmp_path):
    """As AutoGPTQ wrote them: used, and refused if they are not GPTQ's or not those of config.json."""
    rng = torch.Generator().manual_seed(4)
    settings = {"bits": 8, "group_size": GROUP, "desc_act": True, "sym": False, "damp_percent": 0.01}
    out, old = tmp_path / "m", tmp_path / "m" / "quantize_config.json"
    expected = write(
        tiny_model_dir("llama"),
        out,
        {"quant_method": "gptq", **settings},
        lambda name, weight: gptq(name, weight, 8, rng),
    )
    config = json.loads((out / "config.json").read_bytes())
    old.write_text(json.dumps(settings))
    check(out, expected)  # beside the same settings
    digest = checkpoint_digest(out)
    old.write_text(json.dumps(settings | {"bits": 4}))
    assert checkpoint_digest(out) != digest
    with pytest.raises(UnsupportedModelError, match=r"quantize_config.json differ in \['bits'\]"):
        read_weights(out)
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    old.write_text(json.dumps(settings))
    check(out, expected)
    for changed, says in (
        ({"quant_method": "awq"}, "quant_method='awq'"),
        ({"bits": None}, "bits=None"),
        ({"group_size": 0}, "group_size=0"),
    ):
        old.write_text(json.dumps(settings | changed))
        with pytest.raises(UnsupportedModelError, match=says):
            read_weights(out)
    old.write_text(json.dumps({"w_bit": 4, "q_group_size": 128}))
    with pytest.raises(UnsupportedModelError, match=r"quantize_config.json lacks \['bits', 'group_size'\]"):
        read_weights(out)


def test_gptq_of_a_transposed_family(tiny_model_dir, tmp_path):
    """GPT-2 stores its layers [in, out], and their quantised form is that of a linear layer all the same."""
    rng = torch.Generator().manual_seed(0)
    shutil.copytree(tiny_model_dir("gpt2"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.0.mlp.c_fc.weight"))
    parts, wide = gptq(name, tensors.pop(name).t(), 4, rng)
    save_file(tensors | parts, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "m" / "config.json").read_bytes())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert torch.allclose(read_weights(tmp_path / "m")["model.layers.0.mlp.up_proj.weight"], wide, atol=1e-6)


def test_awq_is_read_and_exported(tiny_model_dir, tmp_path):
    """Modules that are not quantised stay as they are."""
    rng = torch.Generator().manual_seed(5)
    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "GEMM",
        "modules_to_not_convert": ["o_proj"],
    }
    expected = write(tiny_model_dir("qwen2"), tmp_path / "m", settings, lambda n, w: awq(n, w, 4, rng), keep=["o_proj"])
    check(tmp_path / "m", expected)
    export_bundle(tmp_path / "m", tmp_path / "b", bits=4, graphs=False)
    assert Bundle.load(tmp_path / "b").quantisation["bits"] == 4


SCHEMES = {
    "w4a16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
    "w4a16 with zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False},
    ),
    "w8a16": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "w3 across words": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": GROUP}),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 with zero points": ("naive-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 with one scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
}


def compressed(kind, name, weight):
    """By compressed-tensors' own compressors, and what they read back."""
    form, args = SCHEMES[kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    out, count = weight.shape
    groups = count // GROUP if args["strategy"] == "group" else 1
    peak = weight.reshape(out, groups, -1).abs().amax(-1)
    largest = 448.0 if args.get("type") == "float" else 2.0 ** (args["num_bits"] - 1) - 1
    scale = (peak if args["strategy"] != "tensor" else peak.amax(keepdim=True).reshape(1)) / largest
    state = {"weight": weight, "weight_scale": scale}
    if not args.get("symmetric", True):
        state["weight_zero_point"] = torch.randint(-3, 4, (out, groups)).to(torch.int8)
    packer = PackedQuantizationCompressor if form == "pack-quantized" else NaiveQuantizationCompressor
    parts = packer.compress(state, scheme)
    wide = packer.decompress(parts, scheme)["weight"]
    module = name.removesuffix("weight")
    return {module + part: tensor.contiguous() for part, tensor in parts.items() if tensor is not None}, wide


def compressed_settings(kind, **changes):
    form, args = SCHEMES[kind]
    group = {"targets": ["Linear"], "weights": QuantizationArgs(**args).model_dump(mode="json")}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": None, "output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **changes,
    }


@pytest.mark.parametrize("kind", SCHEMES)
def test_compressed_tensors(tiny_model_dir, tmp_path, kind):
    torch.manual_seed(3)
    source = tiny_model_dir("llama-untied")
    expected = write(source, tmp_path / "m", compressed_settings(kind), lambda n, w: compressed(kind, n, w))
    check(tmp_path / "m", expected)


def test_a_pattern_goes_before_all_linear_layers(tiny_model_dir, tmp_path):
    settings = compressed_settings("w4a16")
    eight = {"targets": ["re:.*down_proj"], "weights": QuantizationArgs(**SCHEMES["w8a16"][1]).model_dump(mode="json")}
    settings["config_groups"]["group_1"] = eight

    def quantise(name, weight):
        return compressed("w8a16" if "down_proj" in name else "w4a16", name, weight)

    source = tiny_model_dir("llama-untied")
    check(tmp_path / "m", write(source, tmp_path / "m", settings, quantise))
    settings["config_groups"].pop("group_1")
    (tmp_path / "n").mkdir()
    write(source, tmp_path / "n" / "m", settings, quantise)
    with pytest.raises(BundleError, match="words for 128 numbers of 4 bits"):
        read_weights(tmp_path / "n" / "m")


def test_compressed_tensors_have_transformers_own_logits(tiny_model_dir, tmp_path):
    import transformers
    from motet.runtime.checkpoints.decoder import Decoder

    settings = compressed_settings("w4a16")
    write(tiny_model_dir("llama-untied"), tmp_path / "m", settings, lambda n, w: compressed("w4a16", n, w))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, theirs = Decoder.from_dir(tmp_path / "m")(tokens), model(tokens).logits
        plain = Decoder.from_dir(tiny_model_dir("llama-untied"))(tokens)
    assert (found - theirs).abs().max() < 1e-3 * (plain - theirs).abs().max()


@pytest.mark.parametrize("block", [[32, 32], [48, 128], None])
def test_fp8(tiny_model_dir, tmp_path, block):
    """Blocks that do not divide the weight have scales for what is left."""

    def quantise(name, weight):
        rows, columns = block or weight.shape
        wide, scales = torch.empty_like(weight), []
        stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for first in range(0, weight.shape[0], rows):
            scales.append([])
            for left in range(0, weight.shape[1], columns):
                part = weight[first : first + rows, left : left + columns]
                scale = part.abs().max() / 448
                number = (part / scale).to(torch.float8_e4m3fn)
                stored[first : first + rows, left : left + columns] = number
                wide[first : first + rows, left : left + columns] = number.float() * scale
                scales[-1].append(float(scale))
        scale = torch.tensor(scales) if block else torch.tensor(scales[0][0])
        return {name: stored, f"{name}_scale_inv": scale}, wide

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block, "fmt": "e4m3"}
    check(tmp_path / "m", write(tiny_model_dir("qwen3"), tmp_path / "m", settings, quantise))


REFUSED = {
    "another method": ({"quant_method": "aqlm"}, "quantised by 'aqlm'"),
    "no method": ({"bits": 4}, "quantised by None"),
    "gptq of 5 bits": ({"quant_method": "gptq", "bits": 5}, "bits=5"),
    "gptq for Marlin": ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
    "gptq in two formats": (
        {"quant_method": "gptq", "checkpoint_format": "gptq", "format": "gptq_v2"},
        "has two formats",
    ),
    "gptq by module": ({"quant_method": "gptq", "dynamic": {"+:.*mlp.*": {"bits": 8}}}, "options of its own"),
    "awq of gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv'"),
    "gptq that rotates": ({"quant_method": "gptq", "bits": 4, "rotation": "hadamard"}, "rotation='hadamard'"),
    "gptq in groups of 0": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0"),
    "awq by module": ({"quant_method": "awq", "bits": 4, "dynamic": {"x": {"bits": 8}}}, "options of its own"),
    "a group in another format": (
        compressed_settings(
            "w4a16",
            format="mixed-precision",
            config_groups={"g": {"targets": ["Linear"], "weights": {"num_bits": 8}, "format": "mxfp8-quantized"}},
        ),
        "format='mxfp8-quantized'",
    ),
    "a target that is no pattern": (
        compressed_settings("w4a16", config_groups={"g": {"targets": ["re:*x"], "weights": {"num_bits": 4}}}),
        "which is no pattern",
    ),
    "compressed sparsely": (
        compressed_settings("w4a16", sparsity_config={"format": "sparse-24-bitmask"}),
        "format='sparse-24-bitmask'",
    ),
    "compressed in another format": (compressed_settings("w4a16", format="nvfp4-pack-quantized"), "nvfp4"),
    "measured activations": (
        compressed_settings(
            "w8a8",
            config_groups={
                "group_0": {"targets": ["Linear"], "weights": {}, "input_activations": {"dynamic": False}},
            },
        ),
        "measured scales of input_activations",
    ),
    "a compressed cache": (compressed_settings("w8a8", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "fp8 with measured activations": ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme"),
    "fp8 in odd blocks": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size=\[0, 128\]"),
    "no object": ([1], "quantised by None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(tiny_model_dir, tmp_path, case):
    settings, message = REFUSED[case]
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_bytes())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(UnsupportedModelError, match=message):
        read_config(tmp_path / "m")


def _without(part):
    return lambda tensors: {
        name: tensor for name, tensor in tensors.items() if not name.endswith(f"1.mlp.up_proj.{part}")
    }


def _cut(part):
    return lambda tensors: (
        tensors | {name: tensors[name][:-1].contiguous() for name in tensors if name.endswith(f"1.mlp.up_proj.{part}")}
    )


def _with(part, value):
    return lambda tensors: tensors | {f"model.layers.1.mlp.up_proj.{part}": value}


def _strange(tensors):
    return tensors | {"model.layers.1.mlp.up_proj.input_scale": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_without("scales"), BundleError, "up_proj.weight' is damaged"),
        (_without("qweight"), BundleError, "up_proj.weight' is damaged"),
        (_cut("scales"), BundleError, "up_proj.weight' is damaged"),
        (_cut("qzeros"), BundleError, "up_proj.weight' is damaged"),
        (_cut("g_idx"), BundleError, "up_proj.weight' is damaged"),
        (_cut("qweight"), BundleError, "do not fit its config.json"),
        (_strange, UnsupportedModelError, "weights that its family does not use"),
        (_without("qzeros"), BundleError, "there is no 'model.layers.1.mlp.up_proj.qzeros'"),
        (_without("g_idx"), BundleError, "there is no g_idx, and desc_act is set"),
        (_with("g_idx", torch.zeros(64, dtype=torch.int32)), BundleError, "there is no g_idx, and desc_act is set"),
        (_with("qzeros", torch.full((2, 16), -1, dtype=torch.int32)), UnsupportedModelError, "zero points of 0"),
        (_with("qweight", torch.zeros(8, 128)), BundleError, "words of torch.float32"),
        (_with("scales", torch.ones(1, 128)), BundleError, "1 groups for 64 inputs|do not fit"),
        (_with("bias", torch.ones(128)), UnsupportedModelError, "weights that its family does not use"),
        (
            lambda tensors: tensors | {"model.layers.1.mlp.up_proj.weight": torch.ones(128, 64)},
            BundleError,
            "stored twice",
        ),
    ],
)
def test_damage_is_said(tiny_model_dir, tmp_path, change, error, message):
    rng = torch.Generator().manual_seed(1)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}
    write(tiny_model_dir("llama"), tmp_path / "m", settings, lambda n, w: gptq(n, w, 4, rng))
    path = tmp_path / "m" / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        read_weights(tmp_path / "m")
