"""ONNX decoders that another program exported: their answers are those of ONNX Runtime alone and of transformers."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from helpers.compare import relative_error
from helpers.decoder_graph import greedy_with_onnxruntime, greedy_with_transformers, write_decoder_graph
from motet.cli import app
from motet.export.bundle_writer import export_bundle
from motet.export.decoder_graph import export_decoder_graph, find_graph
from motet.export.flavours import Flavour
from motet.export.onnx_directory import write_onnx
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member, Request, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.backends.onnx import decoder_graph
from motet.runtime.backends.open import open_backend
from motet.runtime.engine.embedder import EmbedJob
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import (
    ConfigError,
    UnimplementedError,
)
from motet.runtime.model.bundle import Bundle
from typer.testing import CliRunner

CONFIG = EngineConfig(backend="onnx", max_num_seqs=4, max_model_len=256, prefill_chunk=16, threads=2)
COUNT = 24
PROMPTS = [np.random.default_rng(length).integers(0, 250, length).tolist() for length in (1, 5, 40, 90)]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def expected(model_dir):
    """The answers of transformers."""
    return [greedy_with_transformers(model_dir, prompt, COUNT) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def graph_dir(model_dir, tmp_path_factory):
    return write_decoder_graph(model_dir, tmp_path_factory.mktemp("graph") / "tiny")


@pytest.fixture(scope="module")
def bundle(graph_dir, tmp_path_factory):
    return export_decoder_graph(find_graph(graph_dir), tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def runs(monkeypatch):
    """(sequences, rows) of each run of a graph."""
    shapes, run = [], decoder_graph.GraphRunner._run

    def counted(self, past, token_ids, lengths):
        shapes.append(token_ids.shape)
        return run(self, past, token_ids, lengths)

    monkeypatch.setattr(decoder_graph.GraphRunner, "_run", counted)
    return shapes


def outputs(bundle, prompts=PROMPTS, **sampling):
    params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True, **sampling)
    with Engine.from_bundle(bundle, CONFIG) as engine:
        ensemble = engine.model.default_ensemble
        requests = [Request(str(i), (tuple(prompt),), ensemble, params) for i, prompt in enumerate(prompts)]
        return [found[0] for found in engine.complete(requests)]


def answers(bundle, prompts=PROMPTS):
    return [list(output.token_ids) for output in outputs(bundle, prompts)]


def padding(bundle):
    return Bundle.load(bundle).decoder_graph.padding


# ---- what is served --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "padded", "largest"),
    [(("attention_mask", "position_ids"), "left", 3), (("attention_mask",), "none", 1), ((), "none", 1)],
)
def test_answers_are_onnxruntimes_and_transformers(model_dir, tmp_path, runs, expected, rows, padded, largest):
    """Without position_ids a graph counts the padding as positions, which is found out when it is exported."""
    graph = find_graph(write_decoder_graph(model_dir, tmp_path / "m", rows=rows, external=True))
    bundle = export_decoder_graph(graph, tmp_path / "b")
    assert sorted(file.name for file in bundle.glob("model.*")) == ["model.onnx", "model.onnx_data"]
    assert padding(bundle) == padded
    runs.clear()
    found = answers(bundle)
    assert found == [greedy_with_onnxruntime(graph, prompt, COUNT) for prompt in PROMPTS]
    assert found == expected
    assert max(count for count, _ in runs) >= min(largest, 2) and max(rows for _, rows in runs) == 16
    assert largest > 1 or {count for count, _ in runs} == {1}


@pytest.mark.slow
def test_alone_and_together_have_the_same_bits_without_padding(model_dir, tmp_path):
    bundle = export_decoder_graph(find_graph(write_decoder_graph(model_dir, tmp_path / "m", rows=())), tmp_path / "b")
    together = outputs(bundle, logprobs=2)
    alone = [outputs(bundle, [prompt], logprobs=2)[0] for prompt in PROMPTS]
    assert [output.logprobs for output in together] == [output.logprobs for output in alone]


@pytest.mark.slow
def test_half_precision(model_dir, tmp_path):
    graph = find_graph(write_decoder_graph(model_dir, tmp_path / "m", dtype=np.float16))
    bundle = export_decoder_graph(graph, tmp_path / "b")
    assert answers(bundle, PROMPTS[:2]) == [greedy_with_onnxruntime(graph, prompt, COUNT) for prompt in PROMPTS[:2]]
    backend = open_backend(Bundle.load(bundle), CONFIG)
    assert backend.kv_dtype == "float16"


@pytest.mark.slow
def test_the_layout_of_onnxruntime_genai(model_dir, tmp_path, runs, expected):
    """Grouped-query attention with the rotation in it, and logits of the last position alone; only a genai_config.json."""
    source = Bundle.load(export_bundle(model_dir, tmp_path / "s", bits=32))
    write_onnx(source, tmp_path / "m", flavour=Flavour.GENAI)
    bundle = export_decoder_graph(find_graph(tmp_path / "m"), tmp_path / "b")
    assert padding(bundle) == "right"
    runs.clear()
    assert answers(bundle) == expected
    assert max(count for count, _ in runs) > 1
    backends = [open_backend(Bundle.load(path), CONFIG) for path in (bundle, tmp_path / "s")]
    scores = [backend.score(PROMPTS[2], 0) for backend in backends]
    assert scores[0].shape == (40, 320) and relative_error(*scores) < 1e-4


@pytest.mark.slow
def test_logits_of_a_prompt_are_bounded(bundle, runs, monkeypatch, expected):
    monkeypatch.setattr(decoder_graph, "_MOST_LOGITS", 320 * 7)
    assert answers(bundle, PROMPTS[2:]) == expected[2:]
    assert max(rows for _, rows in runs) == 7


def test_a_prompt_is_scored(bundle):
    scores = open_backend(Bundle.load(bundle), CONFIG).score(PROMPTS[2], 0)[:-1].astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    expected = (scores - np.log(np.exp(scores).sum(1, keepdims=True)))[range(39), PROMPTS[2][1:]]
    (found,) = outputs(bundle, PROMPTS[2:3], prompt_logprobs=0)
    np.testing.assert_allclose(found.prompt_logprobs, expected, atol=1e-4)


def test_scores_and_mixes_with_itself(bundle):
    """Context-aware decoding: one member with two views; the mix is of logits."""
    backend = open_backend(Bundle.load(bundle), CONFIG)
    long, short = PROMPTS[3], PROMPTS[3][50:]
    with Engine.from_bundle(bundle, CONFIG) as engine:
        ensemble = Ensemble((Member("base", 1.5, 0), Member("base", -0.5, 1)))
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        found = engine.complete([Request("x", (tuple(long), tuple(short)), ensemble, params)])[0][0].token_ids
    expected = []
    for _ in range(6):
        mixed = 1.5 * backend.score([*long, *expected], 0)[-1] - 0.5 * backend.score([*short, *expected], 0)[-1]
        expected.append(int(mixed.argmax()))
    assert list(found) == expected


def test_views_are_mixed_at_their_temperatures(bundle):
    """In both spaces, from the logits that the graph gives."""
    backend = open_backend(Bundle.load(bundle), CONFIG)
    views = (tuple(PROMPTS[3]), tuple(PROMPTS[3][50:]))
    logits = np.stack([backend.score(list(view), 0)[-1].astype(np.float64) for view in views])
    logits /= np.array([2.5, 0.4])[:, None]
    members = np.exp(logits - logits.max(1, keepdims=True))
    members /= members.sum(1, keepdims=True)
    pools = {Space.LOGITS: np.exp(0.3 * logits[0] + 0.7 * logits[1]), Space.PROBS: 0.3 * members[0] + 0.7 * members[1]}
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=3)
    with Engine.from_bundle(bundle, CONFIG) as engine:
        for space, pool in pools.items():
            parts = (Member("base", 0.3, temperature=2.5), Member("base", 0.7, 1, temperature=0.4))
            [[found]] = engine.complete([Request("x", views, Ensemble(parts, space), params)])
            expected = np.log(pool / pool.sum())
            assert found.token_ids == [expected.argmax()]
            for token, logprob in found.top_logprobs[0]:
                assert logprob == pytest.approx(expected[token], abs=1e-4)


def test_the_command_finds_the_graph(graph_dir, tmp_path):
    hub = tmp_path / "hub"
    (hub / "onnx").mkdir(parents=True)
    for file in graph_dir.iterdir():
        shutil.copyfile(file, (hub / "onnx" if file.suffix == ".onnx" else hub) / file.name)
    for place in (graph_dir, graph_dir / "model.onnx", hub):
        result = CliRunner().invoke(app, ["export", str(place), str(tmp_path / "b")], catch_exceptions=False)
        assert result.stdout.strip() == str(tmp_path / "b") and padding(tmp_path / "b") == "left"
    assert (tmp_path / "b" / "config.json").is_file()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [["--bits", "8"], ["--no-graphs"], ["--parity"], ["--tail", "a"], ["--merge"]])
def test_options_that_a_graph_cannot_follow(graph_dir, tmp_path, option):
    with pytest.raises(ConfigError, match=f"leave out {option[0].replace('no-', '')}"):
        CliRunner().invoke(app, ["export", str(graph_dir), str(tmp_path / "b"), *option], catch_exceptions=False)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_other_backends_refuse_the_bundle(bundle, backend):
    with pytest.raises(ConfigError, match=f"which backend {backend} cannot run; use backend onnx"):
        open_backend(Bundle.load(bundle), EngineConfig(backend=backend))
    with pytest.raises(ConfigError, match="no weights that this could use"):
        _ = Bundle.load(bundle).config


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"kv_dtype": "int8"}, "kv_dtype"), ({"onnx_provider": "cuda"}, "CPU only"), ({"block_size": 16}, "block_size")],
)
def test_settings_that_a_graph_cannot_follow(bundle, changes, message):
    with pytest.raises(ConfigError, match=message):
        open_backend(Bundle.load(bundle), EngineConfig(backend="onnx", threads=2, **changes))


def test_there_are_no_embeddings(bundle):
    with Engine.from_bundle(bundle, CONFIG) as engine, pytest.raises(UnimplementedError, match="no hidden states"):
        engine.embedder.submit([EmbedJob((1, 2), engine.model.default_ensemble, print)])
