"""`motet explain`: the figures are those of transformers with each member's weights, and the page shows them."""

from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import pytest
import torch
from helpers.models import make_adapter
from motet.cli import app
from motet.export.bundle_writer import export_bundle
from motet.finetune.data.dataset import load_dataset
from motet.finetune.data.encode import encode_parts
from motet.finetune.params import TuneParams
from motet.finetune.search.explain import explain, leave_one_out
from motet.finetune.search.explanation_page import write_page
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member, Space
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.checkpoints.members.adapter import merge, read_adapter
from motet.runtime.errors import BundleError, ConfigError, InvalidEnsembleError
from motet.runtime.model.bundle import Bundle
from motet.runtime.text.tokenizer import Tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

pytestmark = pytest.mark.slow
MIX = {"base": 0.5, "x": 0.3, "y": 0.2}


def ensemble(space=Space.LOGITS, **mix):
    return Ensemble(tuple(Member(name, value) for name, value in mix.items()), space)


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory):
    """(a bundle in full precision, data whose texts are no HTML, member → transformers' model with its weights)."""
    root, model_dir = tmp_path_factory.mktemp("explain"), tiny_model_dir("llama")
    texts = ("an answer", "<script>alert(1)</script>", "two\nlines & 'quotes'", "\x01 control", "tab\tbed")
    records = [{"prompt": f"say <b>{i}</b>", "completion": f"{texts[i % 5]} {i}"} for i in range(200)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    adapters = {name: make_adapter(model_dir, root / name, seed) for seed, name in enumerate(["x", "y"], 1)}
    export_bundle(model_dir, root / "b", tails={"base": None}, loras=adapters, mix=MIX, bits=32)
    base, models = read_weights(model_dir), {}
    for name in MIX:
        models[name] = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        if name in adapters:
            own = merge(base, read_adapter(adapters[name], read_config(model_dir))[1])
            left = models[name].load_state_dict(own, strict=False)
            assert own and not left.unexpected_keys
    return root / "b", root / "data.jsonl", models


def reference(models, mix, space, item):
    """(negative log-likelihood of the mix, of each member, of the mix without each member) of the answer tokens."""
    ids = torch.tensor([item.token_ids])
    with torch.no_grad():
        logits = torch.stack([models[name](ids).logits[0].double() for name in mix])
    at = torch.tensor(item.targets)

    def nll(shares):
        shares = torch.tensor(shares, dtype=torch.double)[:, None, None] / sum(shares)
        pools = {
            Space.LOGITS: lambda: (shares * logits).sum(0).log_softmax(-1),
            Space.PROBS: lambda: (shares * logits.softmax(-1)).sum(0).log(),
        }
        mixed = pools[space]()
        return -mixed[at - 1, ids[0, at]].numpy()

    values = list(mix.values())
    alone = [nll([float(name == other) for other in mix]) for name in mix]
    without = [nll([0.0 if name == other else values[i] for i, other in enumerate(mix)]) for name in mix]
    return nll(values), np.stack(alone), np.stack(without)


@pytest.mark.parametrize("space", list(Space))
def test_figures_are_those_of_transformers(made, space):
    path, data, models = made
    config = EngineConfig(backend="onnx", threads=2)  # whose cache rounds nothing
    found = explain(path, str(data), ensemble=ensemble(space, **MIX), documents=5, max_length=120, config=config)
    tokenizer, bundle = Tokenizer.from_dir(path), Bundle.load(path)
    params = TuneParams(max_length=120).fitted(bundle.config.max_position_embeddings)
    parts, _ = encode_parts(tokenizer, load_dataset(str(data)), {"test": 5}, params, bundle.eos_token_ids[:1])
    assert len(parts["test"]) == len(found.documents) == 5
    expected = {item.source: (item, *reference(models, MIX, space, item)) for item in parts["test"]}
    total = np.concatenate([alone for _, _, alone, _ in expected.values()], axis=1).mean(1)
    assert found.members[found.best] == list(MIX)[int(total.argmin())]
    for document in found.documents:
        item, mixed, alone, without = expected[document.source]
        assert np.abs(document.nll - mixed).max() < 1e-4
        assert np.abs(document.member_nll - alone).max() < 1e-4
        assert np.abs(document.help - (without - mixed)).max() < 2e-4
        assert np.abs(document.help).max() > 1e-3
        assert document.tokens == tuple(tokenizer.token_bytes(item.token_ids[place]) for place in item.targets)
    gains = [found.gain(document) for document in found.documents]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > gains[-1]


@pytest.mark.parametrize("space", list(Space))
def test_members_are_mixed_at_their_temperatures(space):
    logits, tokens = np.random.default_rng(0).standard_normal((2, 7, 11)), np.arange(7)
    mix = Ensemble((Member("a", 0.25, temperature=2.0), Member("b", 0.75, temperature=0.5)), space)
    plain = ensemble(space, a=0.25, b=0.75)
    nll, single, without = leave_one_out(mix, logits, tokens)
    mixed, _, rest = leave_one_out(plain, logits * np.array([0.5, 2.0])[:, None, None], tokens)
    assert nll == pytest.approx(mixed)
    assert without == pytest.approx(rest)
    assert single == pytest.approx(leave_one_out(plain, logits, tokens)[1])  # alone it has no temperature


@pytest.mark.parametrize("space", list(Space))
def test_a_member_that_is_left_out_leaves_the_mix_of_the_others(space):
    """By hand: of two members the other one is left."""
    logits = np.random.default_rng(0).standard_normal((2, 7, 11))
    tokens = np.arange(7)
    nll, single, without = leave_one_out(ensemble(space, a=0.25, b=0.75), logits, tokens)
    assert without == pytest.approx(single[::-1])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    if space is Space.PROBS:
        mixed = 0.25 * p[0] + 0.75 * p[1]
    else:
        mixed = p[0] ** 0.25 * p[1] ** 0.75
        mixed /= mixed.sum(-1, keepdims=True)
    assert nll == pytest.approx(-np.log(mixed[tokens, tokens]))


class Reader(html.parser.HTMLParser):
    """Elements that are open at the end, the tables' rows, and what a browser would run or fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.loads = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "link", "img", "iframe") or {"src", "href"} & dict(attributes).keys():
            self.loads.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += text


def test_the_page(made, tmp_path):
    path, data, _ = made
    found = explain(path, str(data), documents=6, max_length=120, config=EngineConfig(threads=1))
    write_page(tmp_path / "report.html", found)
    text = (tmp_path / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == ["!doctype"] or reader.open == []
    assert reader.loads == []
    assert "<script" not in text and "http" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", text)
    members = {row[0]: row for row in reader.rows if row[0] in MIX}
    assert {name: float(row[1]) for name, row in members.items()} == MIX
    assert float(members["x"][3]) == pytest.approx(found.member_nll()[1], abs=1e-4)
    tokens = [row for row in reader.rows if re.match(r"\d+\. ", row[0])]
    documents = [row for row in tokens if len(row) == 9]
    tokens = [row for row in tokens if len(row) == 8]
    assert [row[0] for row in documents] == [f"{i}. {one.source}" for i, one in enumerate(found.documents, 1)]
    assert len(tokens) == sum(len(one.nll) for one in found.documents)
    first = found.documents[0]
    for place, row in enumerate(tokens[: len(first.nll)]):
        assert float(row[1]) == pytest.approx(first.nll[place], abs=1e-3)
        assert [float(cell) for cell in row[2:5]] == pytest.approx(first.member_nll[:, place].tolist(), abs=1e-3)
        helps = dict(zip(MIX, first.help[:, place].tolist(), strict=True))
        most, least = max(helps, key=helps.get), min(helps, key=helps.get)
        assert row[6] == (f"{most} {helps[most]:+.3f}" if helps[most] > 0 else "–")
        assert row[7] == (f"{least} {helps[least]:+.3f}" if helps[least] < 0 else "–")


def test_what_cannot_be_explained_is_refused(made, tmp_path):
    path, data, _ = made
    for given, message in (
        ({"ensemble": ensemble(base=1.0)}, "of 'base' alone"),
        ({"ensemble": ensemble(base=1.0, x=0.0)}, "of 'base' alone"),
        ({"ensemble": ensemble(base=1.5, x=-0.5)}, "only if no coefficient is negative"),
        ({"ensemble": ensemble(base=0.5, z=0.5)}, "'z' is not a member"),
    ):
        with pytest.raises(InvalidEnsembleError, match=message):
            explain(path, str(data), **given)
    with pytest.raises(ConfigError, match="documents must be at least 1"):
        explain(path, str(data), documents=0)


def test_the_command(made, tmp_path):
    path, data, _ = made
    call = ["explain", str(path), "--data", str(data), "--documents", "3", "--max-length", "120", "--threads", "1"]
    out = tmp_path / "report.html"
    done = CliRunner().invoke(app, [*call, "--out", str(out), "--mix", "base=0.5,y=0.5", "--space", "probs"])
    assert done.exit_code == 0, done.exception
    assert "3 documents" in done.stdout and "in space probs" in out.read_text()
    assert ">x<" not in out.read_text()
    for wrong, kind in ((str(tmp_path), ConfigError), (str(tmp_path / "no" / "report.html"), ConfigError)):
        assert isinstance(CliRunner().invoke(app, [*call, "--out", wrong]).exception, kind)
    manifest = json.loads((path / "motet.json").read_text())
    changed = json.loads(json.dumps(manifest))
    changed["members"][1]["provenance"]["data"] = {"name": "data.jsonl", "digest": "of another split"}
    (path / "motet.json").write_text(json.dumps(changed))
    try:
        refused = CliRunner().invoke(app, [*call, "--out", str(out)]).exception
    finally:
        (path / "motet.json").write_text(json.dumps(manifest))
    assert isinstance(refused, BundleError) and "that are explained" in str(refused)
