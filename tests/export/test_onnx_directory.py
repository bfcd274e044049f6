"""`motet export-onnx`: what the directory holds, what is refused, tensors beyond 4 GB, and the way back into a bundle."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from helpers.decoder_graph import greedy_with_onnxruntime, greedy_with_transformers
from helpers.models import make_adapter, write_model
from helpers.portable_graph import Texts, exact_session
from motet.cli import main
from motet.export.bundle_writer import export_bundle
from motet.export.data_file import DataFile
from motet.export.decoder_graph import export_decoder_graph, find_graph
from motet.export.flavours import Flavour, WeightForm
from motet.export.onnx_directory import write_onnx
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import BundleError, ConfigError, UnsupportedModelError
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.files import new_directory
from safetensors.numpy import load_file, save_file

PROMPTS = [np.random.default_rng(length).integers(0, 250, length).tolist() for length in (1, 5, 40)]
COUNT = 16


@pytest.fixture(scope="module")
def bundle(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    return Bundle.load(export_bundle(tiny_model_dir("llama"), path, bits=32))


def served(path, backend, prompts=PROMPTS):
    """Greedy answers to the prompts, in one batch."""
    params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
    kv_dtype = "bf16" if backend == "cpu" else "auto"
    config = EngineConfig(
        backend=backend, max_num_seqs=4, max_model_len=256, prefill_chunk=16, threads=2, kv_dtype=kv_dtype
    )
    with Engine.from_bundle(path, config) as engine:
        ensemble = engine.model.default_ensemble
        requests = [Request(str(i), (tuple(prompt),), ensemble, params) for i, prompt in enumerate(prompts)]
        return [list(found[0].token_ids) for found in engine.complete(requests)]


# ---- what is written -------------------------------------------------------------------------------------------------


def test_the_layout_of_optimum(bundle, tmp_path):
    out = write_onnx(bundle, tmp_path / "o")
    assert {file.name for file in out.iterdir()} == {
        *("model.onnx", "model.onnx_data", "motet-onnx.json", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    model = onnx.load(out / "model.onnx", load_external_data=False)
    caches = [f"{layer}.{kind}" for layer in range(4) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{cache}" for cache in caches)]
    assert [value.name for value in model.graph.input] == inputs
    assert [value.name for value in model.graph.output] == ["logits", *(f"present.{cache}" for cache in caches)]
    record = json.loads((out / "motet-onnx.json").read_text())
    assert record == {
        "bundle": "tiny", "bundle_digest": bundle.digest, "member": "base", "flavour": "portable", "opset": 21,
        "weights": "stored",
    }  # fmt: skip
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == list(bundle.eos_token_ids)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = sum(t.ByteSize() for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL)
    assert len(outside) == 3 + 4 * 6 + 1 and inside < 4000
    assert all(int(entry.value) % 4096 == 0 for t in outside for entry in t.external_data if entry.key == "offset")


def test_config_json_is_the_graphs(tmp_path):
    """Without what is said of the checkpoint's weights and code, and with the context that the tables of positions have."""
    model_dir = write_model(tmp_path / "m", "phi3-long")
    bundle = Bundle.load(export_bundle(model_dir, tmp_path / "b", bits=32))
    changes = {"quantization_config": {"quant_method": "gptq"}, "auto_map": {"AutoConfig": "x.X"}}
    values = json.loads((bundle.path / "config.json").read_text())
    assert values["max_position_embeddings"] == 1024 and bundle.config.max_position_embeddings == 512
    (bundle.path / "config.json").write_text(json.dumps(values | changes))
    out = write_onnx(Bundle.load(bundle.path, verify=False), tmp_path / "o")
    assert json.loads((out / "config.json").read_text()) == values | {"max_position_embeddings": 512}


def test_onnxruntime_genai(bundle, tmp_path):
    """The operators of ONNX Runtime, with the member's tensors alone."""
    out = write_onnx(bundle, tmp_path / "o", flavour=Flavour.GENAI)
    assert {file.name for file in out.iterdir()} == {
        *("model.onnx", "model.onnx_data", "motet-onnx.json", "genai_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert "GroupQueryAttention" in {
        n.op_type for n in onnx.load(out / "model.onnx", load_external_data=False).graph.node
    }
    session, tokens = exact_session(out / "model.onnx"), list(range(40, 60))
    for _ in range(8):
        empty = np.zeros((1, 2, 0, 16), np.float32)
        feeds = {value.name: empty for value in session.get_inputs() if "past" in value.name}
        feeds |= {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
        tokens.append(int(session.run(["logits"], feeds)[0][0, -1].argmax()))
    assert tokens[20:] == served(bundle.path, "onnx", [list(range(40, 60))])[0][:8]


@pytest.mark.slow
def test_tensors_beyond_four_gigabytes(tiny_model_dir, tmp_path, monkeypatch):
    """A sparse file, whose first tensor begins at 5 GiB: the graph stays small, is checked and runs."""
    bundle = Bundle.load(export_bundle(tiny_model_dir("llama"), tmp_path / "b", bits=4, graphs=False))
    near, begin, start = write_onnx(bundle, tmp_path / "near"), DataFile.__init__, 5 * 2**30

    def far_away(self, *arguments):
        begin(self, *arguments)
        self._file.seek(start)

    monkeypatch.setattr(DataFile, "__init__", far_away)
    out = write_onnx(bundle, tmp_path / "far")
    data = (out / "model.onnx_data").stat()
    assert data.st_size > start and data.st_blocks * 512 < 10e6 and (out / "model.onnx").stat().st_size < 2**18
    offsets = [
        int(entry.value)
        for tensor in onnx.load(out / "model.onnx", load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    ]
    assert min(offsets) == start
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    logits = [Texts(exact_session(path / "model.onnx")).run([PROMPTS[2]])[0] for path in (near, out)]
    assert np.array_equal(*logits)


# ---- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "falcon", "falcon-new", "phi3-long", "qwen3"])
def test_a_bundle_of_the_graph_gives_the_same_answers(tiny_model_dir, tmp_path, family):
    """Served with padding: the tokens of the bundle itself, of ONNX Runtime alone and of transformers."""
    model_dir = tiny_model_dir(family)
    bundle = Bundle.load(export_bundle(model_dir, tmp_path / "b", bits=32))
    graph = write_onnx(bundle, tmp_path / "o") / "model.onnx"
    back = export_decoder_graph(find_graph(tmp_path / "o"), tmp_path / "back")
    assert Bundle.load(back).decoder_graph.padding == "left"
    found = served(back, "onnx")
    assert found == served(bundle.path, "onnx")
    assert found == [greedy_with_onnxruntime(graph, prompt, COUNT) for prompt in PROMPTS]
    assert found == [greedy_with_transformers(model_dir, prompt, COUNT) for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.native
def test_the_real_model(real_model_dir, tmp_path):
    """The cpu backend rounds keys and values to 16 bits, which changes no token of these answers."""
    bundle = export_bundle(real_model_dir, tmp_path / "b", bits=32, graphs=False)
    write_onnx(Bundle.load(bundle), tmp_path / "o")
    back = export_decoder_graph(find_graph(tmp_path / "o"), tmp_path / "back")
    with Engine.from_bundle(back, EngineConfig(backend="onnx", threads=2, max_model_len=256)) as engine:
        texts = ("Explain what a hash table is.", "Name three colours.")
        prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    assert served(back, "onnx", prompts) == served(bundle, "cpu", prompts)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_bundle_of_a_quantised_graph(tiny_model_dir, tmp_path, bits):
    bundle = Bundle.load(export_bundle(tiny_model_dir("llama"), tmp_path / "b", bits=bits, graphs=False))
    graph = write_onnx(bundle, tmp_path / "o") / "model.onnx"
    back = export_decoder_graph(find_graph(tmp_path / "o"), tmp_path / "back")
    assert served(back, "onnx") == [greedy_with_onnxruntime(graph, prompt, COUNT) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", None, "no tensor 'model.norm.weight'"),
        ("model.norm.weight", lambda a: a[:32], "do not fit its configuration"),
        ("model.norm.weight", lambda a: a.view(np.uint16), r"norm.weight' is U16 \[128\], it must be F32 or F16 or U8"),
        ("rotary.cos", lambda a: a[:, :5], "do not fit its configuration"),
        (
            "model.layers.1.mlp.down_proj.weight.scales",
            lambda a: a[:, :1],
            r"scales' is F16 \[64, 1\], it must be F32 or F16",
        ),
        ("model.layers.1.mlp.down_proj.weight.values", lambda a: a.view(np.int8), "values' is I8 .*, it must be U8"),
        ("model.layers.1.mlp.down_proj.weight.minima", lambda a: a[1:], "minima' is F16 .*, it must be F32 or F16"),
        ("model.layers.2.self_attn.o_proj.weight.values", lambda a: a[:32], "it must be F32 or F16"),
        ("model.layers.0.self_attn.qkv_proj.weight", lambda a: a[:, :1], "do not fit"),
    ],
)
def test_tensors_that_are_not_those_of_the_configuration(tiny_model_dir, tmp_path, name, change, message):
    """Files whose digests are right, as who wants to harm makes them."""
    bundle = export_bundle(tiny_model_dir("llama"), tmp_path / "b", bits=4, graphs=False)
    tensors = load_file(bundle / "model.safetensors")
    for stored in [own for own in tensors if own == name or own.startswith(f"{name}.")]:
        if change is None:
            del tensors[stored]
        else:
            tensors[stored] = np.ascontiguousarray(change(tensors[stored]))
    save_file(tensors, bundle / "model.safetensors")
    with pytest.raises(BundleError, match=message):
        write_onnx(Bundle.load(bundle, verify=False), tmp_path / "o")
    assert not (tmp_path / "o").exists()


# ---- the command, and what is refused --------------------------------------------------------------------------------


def motet(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr)."""
    monkeypatch.setattr("sys.argv", ["motet", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


def test_the_command(tiny_model_dir, tmp_path, monkeypatch, capsys):
    model_dir = tiny_model_dir("llama")
    loras = {name: make_adapter(model_dir, tmp_path / name, seed) for seed, name in enumerate(("a", "b"))}
    bundle = export_bundle(model_dir, tmp_path / "two", loras=loras)
    code, _, error = motet(monkeypatch, capsys, "export-onnx", bundle, tmp_path / "o")
    assert code == 2 and error == "motet: 'two' has the members ['a', 'b'], and a graph has one; name it (--member)\n"
    code, _, error = motet(monkeypatch, capsys, "export-onnx", bundle, tmp_path / "o", "--member", "c")
    assert code == 2 and error == "motet: 'two' has no member 'c'; its members are ['a', 'b']\n"
    for opset in ("16", "24"):
        chosen = ("--member", "a", "--opset", opset)
        code, _, error = motet(monkeypatch, capsys, "export-onnx", bundle, tmp_path / "o", *chosen)
        assert code == 2 and error == f"motet: opset must be in 17…23, got {opset}\n"
    for option, value in (("--opset", 21), ("--weights", "float32")):
        chosen = ("--member", "a", "--flavour", "genai", option, value)
        code, _, error = motet(monkeypatch, capsys, "export-onnx", bundle, tmp_path / "o", *chosen)
        assert code == 2 and f"the flavour genai has no {option[2:]} to choose" in error
    assert not (tmp_path / "o").exists()
    chosen = ("--member", "b", "--opset", "18", "--weights", "float16")
    assert motet(monkeypatch, capsys, "export-onnx", bundle, tmp_path / "o", *chosen) == (0, f"{tmp_path / 'o'}\n", "")
    record = json.loads((tmp_path / "o" / "motet-onnx.json").read_text())
    assert (record["member"], record["opset"], record["weights"]) == ("b", 18, "float16")
    assert motet(monkeypatch, capsys, "export-onnx", bundle, tmp_path / "o", "--member", "a")[0] == 0
    assert json.loads((tmp_path / "o" / "motet-onnx.json").read_text())["member"] == "a"


def test_only_its_own_directory_is_replaced(bundle, tmp_path):
    """A bundle of one member has a model.onnx too."""
    with pytest.raises(ConfigError, match="exists and is not an ONNX decoder that Motet wrote"):
        write_onnx(bundle, bundle.path)
    Bundle.load(bundle.path)


def test_two_exports_into_one_directory(bundle, tiny_model_dir, tmp_path, monkeypatch, capsys):
    """The second says so at once, and the first is whole; for bundles and for decoders."""
    kinds = {
        "motet.json": (
            "a bundle",
            ("export", tiny_model_dir("llama"), tmp_path / "out", "--no-parity", "--bits", "32"),
        ),
        "motet-onnx.json": ("a decoder", ("export-onnx", bundle.path, tmp_path / "out")),
    }
    for marker, (what, command) in kinds.items():
        with new_directory(tmp_path / "out", marker, what) as first:
            (first / marker).write_text("the first")
            code, _, error = motet(monkeypatch, capsys, *command)
            assert code == 2 and f"another process is writing '{tmp_path / 'out'}'; wait until it has ended" in error
        assert [file.read_text() for file in (tmp_path / "out").iterdir()] == ["the first"]
        assert motet(monkeypatch, capsys, *command)[0] == 0
        assert (tmp_path / "out" / "model.onnx").is_file()
        shutil.rmtree(tmp_path / "out")


def test_experts_are_refused(tiny_model_dir, tmp_path):
    bundle = Bundle.load(export_bundle(tiny_model_dir("olmoe"), tmp_path / "b", graphs=False))
    for flavour, message in ((Flavour.PORTABLE, "6 experts, and ONNX graphs have none"), (Flavour.GENAI, "no experts")):
        with pytest.raises(UnsupportedModelError, match=message):
            write_onnx(bundle, tmp_path / "o", flavour=flavour)


def test_the_temperature_of_a_whole_mix_is_refused(tiny_model_dir, tmp_path):
    """Other runtimes would sample from other distributions than the bundle's. One in a mix of several is the mix's."""
    path = export_bundle(tiny_model_dir("llama"), tmp_path / "b", tails={"a": None, "b": None}, num_tail_layers=1)
    manifest = json.loads((path / "motet.json").read_text())
    for mix, is_refused in (((1.0, 0.0), True), ((0.5, 0.5), False)):
        for member, share in zip(manifest["members"], mix, strict=True):
            member.update(mix=share, temperature=2.0)
        (path / "motet.json").write_text(json.dumps(manifest))
        if is_refused:
            with pytest.raises(
                UnsupportedModelError, match=r"with 'a' alone at temperature 2, and .* without that temperature"
            ):
                write_onnx(Bundle.load(path), tmp_path / "o", "a")
            assert not (tmp_path / "o").exists()
            write_onnx(Bundle.load(path), tmp_path / "other", "b")  # it is not what the bundle answers with
        else:
            write_onnx(Bundle.load(path), tmp_path / "o", "a")


def test_bundles_that_cannot_be_written(bundle, tmp_path):
    graph = write_onnx(bundle, tmp_path / "o", form=WeightForm.FLOAT32)
    foreign = Bundle.load(export_decoder_graph(find_graph(graph), tmp_path / "foreign"))
    with pytest.raises(ConfigError, match="no weights that this could use"):
        write_onnx(foreign, tmp_path / "again")
    manifest = json.loads((bundle.path / "motet.json").read_text())
    del manifest["files"]["config.json"]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (*manifest["files"], "motet.json"):
        (copy / name).write_bytes((bundle.path / name).read_bytes())
    (copy / "motet.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"has no config\.json, which the graph's runtimes read"):
        write_onnx(Bundle.load(copy), tmp_path / "again")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(BundleError, match="damaged"):
        write_onnx(Bundle.load(copy, verify=False), tmp_path / "again")
    assert not (tmp_path / "again").exists()
