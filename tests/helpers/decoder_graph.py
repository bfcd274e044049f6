"""A llama as an ONNX decoder graph in the layout of Optimum's exporter, written operator by operator, and greedy answers of plain
ONNX Runtime and of transformers to compare with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


class _Writer:
    def __init__(self, dtype):
        self.dtype, self.nodes, self.initializers = dtype, [], {}

    def op(self, name, *inputs, output=None, **attributes):
        output = output or f"{name}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(name, list(inputs), [output], **attributes))
        return output

    def ints(self, *values):
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def constant(self, name, value):
        self.initializers.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def real(self, value, name=None):
        return self.constant(name or f"real_{value}", np.asarray(value, self.dtype))

    def size(self, tensor, axis):
        """A scalar."""
        return self.op("Squeeze", self.op("Gather", self.op("Shape", tensor), self.ints(axis)))

    def norm(self, x, weight, eps):
        mean = self.op("ReduceMean", self.op("Mul", x, x), axes=[-1])
        root = self.op("Sqrt", self.op("Add", mean, self.real(eps)))
        return self.op("Mul", self.op("Div", x, root), self.real(weight.numpy(), f"norm_{len(self.nodes)}"))

    def linear(self, x, weight):
        return self.op("MatMul", x, self.real(weight.numpy().T, f"weight_{len(self.nodes)}"))

    def rotate(self, x, cos, sin, half):
        first, second = (
            self.op("Slice", x, self.ints(*where[:1]), self.ints(*where[1:]), self.ints(3))
            for where in ((0, half), (half, 2 * half))
        )
        turned = self.op("Concat", self.op("Neg", second), first, axis=3)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))


def write_decoder_graph(model_dir, out, *, rows=("attention_mask", "position_ids"), dtype=np.float32, external=False):
    """Directory of the graph of a tiny llama; `rows`: its inputs beside input_ids; `external`: its tensors are in a file beside
    it."""
    from motet.runtime.checkpoints.huggingface import read_config, read_weights

    config, weights, g = read_config(model_dir), read_weights(model_dir), _Writer(dtype)
    heads, kv, size, half = config.num_heads, config.num_kv_heads, config.head_size, config.head_size // 2
    x = g.op("Gather", g.real(weights["model.embed_tokens.weight"].numpy(), "embedding"), "input_ids")
    count, past = g.size("input_ids", 1), g.size("past_key_values.0.key", 2)
    total = g.op("Add", past, count)
    one = g.op("Squeeze", g.ints(1))
    places = g.op("Range", past, total, one)
    keys = g.op("Range", g.op("Squeeze", g.ints(0)), total, one)
    allowed = g.op("LessOrEqual", keys, g.op("Unsqueeze", places, g.ints(1)))
    if "attention_mask" in rows:
        mask = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=TensorProto.BOOL), g.ints(1, 2))
        allowed = g.op("And", allowed, mask)
    bias = g.op("Where", allowed, g.real(0.0), g.real(-6e4))
    positions = "position_ids" if "position_ids" in rows else g.op("Unsqueeze", places, g.ints(0))
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    angles = g.op(
        "Mul",
        g.op("Unsqueeze", g.op("Cast", positions, to=TensorProto.FLOAT), g.ints(1, 3)),
        g.constant("frequencies", np.concatenate([frequencies] * 2).astype(np.float32)),
    )
    cos, sin = (g.op("Cast", g.op(name, angles), to=TYPES[dtype]) for name in ("Cos", "Sin"))
    for layer in range(config.num_layers):
        own = f"model.layers.{layer}"
        normed = g.norm(x, weights[f"{own}.input_layernorm.weight"], config.norm_eps)
        heads_of = {}
        for part, number in (("q", heads), ("k", kv), ("v", kv)):
            projected = g.linear(normed, weights[f"{own}.self_attn.{part}_proj.weight"])
            heads_of[part] = g.op(
                "Transpose", g.op("Reshape", projected, g.ints(0, 0, number, size)), perm=[0, 2, 1, 3]
            )
        query, key = (g.rotate(heads_of[part], cos, sin, half) for part in ("q", "k"))
        present = {}
        for kind, new in (("key", key), ("value", heads_of["v"])):
            name = f"{layer}.{kind}"
            present[kind] = g.op("Concat", f"past_key_values.{name}", new, axis=2, output=f"present.{name}")
            repeated = g.op("Concat", *[g.op("Unsqueeze", present[kind], g.ints(2))] * (heads // kv), axis=2)
            present[kind] = g.op("Reshape", repeated, g.ints(0, heads, -1, size))
        scores = g.op("MatMul", query, g.op("Transpose", present["key"], perm=[0, 1, 3, 2]))
        scores = g.op("Add", g.op("Mul", scores, g.real(size**-0.5)), bias)
        attended = g.op("MatMul", g.op("Softmax", scores, axis=-1), present["value"])
        joined = g.op("Reshape", g.op("Transpose", attended, perm=[0, 2, 1, 3]), g.ints(0, 0, heads * size))
        x = g.op("Add", x, g.linear(joined, weights[f"{own}.self_attn.o_proj.weight"]))
        normed = g.norm(x, weights[f"{own}.post_attention_layernorm.weight"], config.norm_eps)
        gate, up = (g.linear(normed, weights[f"{own}.mlp.{part}_proj.weight"]) for part in ("gate", "up"))
        inner = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        x = g.op("Add", x, g.linear(inner, weights[f"{own}.mlp.down_proj.weight"]))
    normed = g.norm(x, weights["model.norm.weight"], config.norm_eps)
    g.op("MatMul", normed, g.op("Transpose", "embedding", perm=[1, 0]), output="logits")

    def value(name, kind, *shape):
        return helper.make_tensor_value_info(name, kind, shape)

    kinds = {"attention_mask": "past_sequence_length + sequence_length", "position_ids": "sequence_length"}
    inputs = [value("input_ids", TensorProto.INT64, "batch_size", "sequence_length")]
    inputs += [value(name, TensorProto.INT64, "batch_size", length) for name, length in kinds.items() if name in rows]
    outputs = [value("logits", TYPES[dtype], "batch_size", "sequence_length", config.vocab_size)]
    for layer in range(config.num_layers):
        for kind in ("key", "value"):
            shape = ("batch_size", kv, "past_sequence_length", size)
            inputs.append(value(f"past_key_values.{layer}.{kind}", TYPES[dtype], *shape))
            shape = ("batch_size", kv, "past_sequence_length + sequence_length", size)
            outputs.append(value(f"present.{layer}.{kind}", TYPES[dtype], *shape))
    graph = helper.make_graph(g.nodes, "main_graph", inputs, outputs, list(g.initializers.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    out.mkdir(parents=True)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(Path(model_dir) / file, out / file)
    where = {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 1024} if external else {}
    onnx.save(model, out / "model.onnx", **where)
    return out


def greedy_with_onnxruntime(graph: Path, prompt: list[int], count: int) -> list[int]:
    """The graph alone: the whole prompt, then token by token with what was present before."""
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # the backend made a pool for the whole process
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), [value.name for value in session.get_outputs()]
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16 if "16" in value.type else np.float32)
        for value in inputs
        if value.name.startswith("past")
    }
    tokens, new = list(prompt), list(prompt)
    for _ in range(count):
        feeds = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens) - len(new), len(tokens))[None],
        }
        names = {value.name for value in inputs}
        feeds = {name: array for name, array in feeds.items() if name in names}
        found = dict(zip(outputs, session.run(None, feeds | past), strict=True))
        past = {name.replace("present", "past_key_values"): array for name, array in found.items() if name != "logits"}
        new = [int(found["logits"][0, -1].argmax())]
        tokens += new
    return tokens[len(prompt) :]


def greedy_with_transformers(model_dir: Path, prompt: list[int], count: int) -> list[int]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
    return found[0, len(prompt) :].tolist()
