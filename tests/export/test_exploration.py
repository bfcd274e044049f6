"""A search for the bundles that are worth their bytes."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import random
import shutil

import numpy as np
import pytest
from helpers.models import make_tail
from motet.export.base_model import BaseModel
from motet.export.bundle_writer import export_bundle
from motet.export.exploration.answers import Question, _recall, ask
from motet.export.exploration.candidate import Candidate, choose, front
from motet.export.exploration.explore import Exploration, explore
from motet.export.parity import HeldOut, read_parity
from motet.export.quantisation.calibration import Calibration
from motet.export.quantisation.method import Method, Target
from motet.export.quantisation.quantiser import plan_bits
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.backends.open import open_backend
from motet.runtime.engine.consensus import similarity
from motet.runtime.engine.open import open_engine
from motet.runtime.errors import BundleError, ConfigError, UnavailableError
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.layout import decoder_layout
from motet.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

CHUNKS = [np.random.default_rng(seed).integers(0, 256, 64).tolist() for seed in range(8)]
HELD_OUT = [np.random.default_rng(100).integers(0, 256, 64).tolist()]
QUESTIONS = [Question((1, 2, 3, 4), (5, 6, 7)), Question((9, 8), (7,))]
SERVING = EngineConfig(threads=2)


def candidate(name, num_bytes, kl, bits=4.0, method=Method.GPTQ):
    return Candidate(name, method, bits, bits, num_bytes, kl, kl, 0.0, 1.0, 0.5, None, 1.0, 1.0, (kl,), 1.0)


def exploring(model_dir, calibration, **changes):
    """A search over a tiny model; `changes` of it, and `members` of its bundles."""
    model, text = BaseModel(model_dir), Calibration(CHUNKS, calibration)
    members = changes.pop("members", {})

    def export(path, method, target):
        held_out = HeldOut(HELD_OUT, SERVING)
        return export_bundle(model, path, **members, method=method, target=target, calibration=text, held_out=held_out)

    wanted = Exploration(
        model.config, export, {"model": model.digest}, 1e6, questions=QUESTIONS, serving=SERVING, max_candidates=8
    )
    return dataclasses.replace(wanted, **changes)


@pytest.fixture(scope="module")
def exploration(tiny_model_dir, tmp_path_factory):
    return exploring(tiny_model_dir("llama"), tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module")
def found(exploration, tmp_path_factory):
    out = tmp_path_factory.mktemp("found") / "search"
    seen = []
    return explore(exploration, out, seen.append), out, seen


def test_each_method_and_then_what_the_processes_say(found, exploration):
    result, _, seen = found
    assert [one.method for one in result.candidates[:6]] == [
        *[Method.GPTQ] * 3,
        Method.SEARCH,
        Method.AWQ,
        Method.ROUND,
    ]
    assert list(result.candidates) == seen and len(seen) == 8
    low, high = plan_bits(exploration.config)
    assert all(low <= one.bits <= one.target_bits <= high for one in result.candidates)
    assert result.candidates[2].bits == pytest.approx(high, abs=1e-3)
    assert (
        result.candidates[2].kl < result.candidates[0].kl
        and result.candidates[2].num_bytes > result.candidates[0].num_bytes
    )


def test_what_is_kept_is_what_no_other_beats(found):
    result, out, _ = found
    names = {one.name for one in result.kept}
    assert {path.name for path in out.iterdir() if path.is_dir()} == names
    for one in result.candidates:
        beaten = any(
            other.num_bytes <= one.num_bytes and other.kl <= one.kl for other in result.candidates if other != one
        )
        assert (one.name in names) is not beaten
    assert result.path == out / result.chosen.name and result.path.is_dir()


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_what_is_kept_serves_everywhere(found, backend):
    """The stored probe is answered."""
    result, out, _ = found
    for one in result.kept:
        open_backend(Bundle.load(out / one.name), EngineConfig(backend=backend, threads=2, max_model_len=64)).close()


def test_figures_are_those_of_the_bundle(found):
    result, out, _ = found
    one = result.chosen
    (member,) = read_parity(out / one.name).members
    assert (one.kl, one.reverse_kl, one.top1) == (member.kl, member.reverse_kl, member.top1)
    assert one.bits == Bundle.load(out / one.name).quantisation["average_bits"]
    assert len(one.layer_kl) == 5 and min(one.layer_kl) > 0
    with open_engine(out / one.name, SERVING) as engine:
        answers = ask(engine, engine.tokenizer, QUESTIONS)
    assert (one.recall, one.rouge_l) == (answers.recall, answers.rouge_l)


def test_the_report_has_all_of_it(found):
    result, out, _ = found
    report = json.loads((out / "report.json").read_text())
    assert report["chosen"] == result.chosen.name and report["front"] == [one.name for one in result.kept]
    assert [Candidate.from_dict(one) for one in report["candidates"]] == [
        dataclasses.replace(one, layer_kl=list(one.layer_kl)) for one in result.candidates
    ]
    page = (out / "report.html").read_text()
    assert all(one.name in page for one in result.candidates) and result.why in page
    assert not any(word in page for word in ("<script", "<link", "src=", "@import"))  # nothing is fetched


def test_it_goes_on_where_it_was_stopped(found, exploration, tmp_path, monkeypatch):
    """Stopped in the middle of a candidate, and of a line."""
    whole, _, _ = found
    calls = []

    def stopping(path, method, target):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return exploration.export(path, method, target)

    with pytest.raises(KeyboardInterrupt):
        explore(dataclasses.replace(exploration, export=stopping), tmp_path / "s")
    with (tmp_path / "s" / "candidates.jsonl").open("a") as file:
        file.write('{"name": "half')
    again = explore(dataclasses.replace(exploration, export=stopping), tmp_path / "s")
    assert len(calls) == 9
    assert [(one.name, one.kl) for one in again.candidates] == [(one.name, one.kl) for one in whole.candidates]


def test_time_is_that_of_the_whole_search(exploration, tmp_path):
    """A time that is over makes one; the same time makes no more, and more time does."""
    short = dataclasses.replace(exploration, seconds=1e-9, method=Method.ROUND)
    result = explore(short, tmp_path / "s")
    assert len(result.candidates) == 1 and result.chosen.method is Method.ROUND
    assert explore(short, tmp_path / "s").candidates == result.candidates
    longer = dataclasses.replace(short, seconds=1e6, max_candidates=3)
    assert len(explore(longer, tmp_path / "s").candidates) == 3
    assert {path.name for path in (tmp_path / "s").iterdir() if path.is_dir()} == {
        one.name for one in explore(short, tmp_path / "s").kept
    }


def test_what_a_kill_leaves_is_removed(exploration, tmp_path):
    """Between an export and its line, and inside an export."""
    wanted, out = dataclasses.replace(exploration, method=Method.ROUND, max_candidates=1), tmp_path / "s"
    first = explore(wanted, out)
    shutil.copytree(first.path, out / "001-round-5.00")
    (out / ".001-round-5.00-new-0123").mkdir()
    (out / "mine").mkdir()
    explore(wanted, out)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {first.path.name, "mine"}


def test_reports_are_there_while_it_runs(exploration, tmp_path):
    seen = []

    def look(candidate):
        report = json.loads((tmp_path / "s" / "report.json").read_text())
        seen.append([one["name"] for one in report["candidates"]])
        assert (tmp_path / "s" / report["chosen"]).is_dir() and candidate.name in seen[-1]

    explore(dataclasses.replace(exploration, method=Method.ROUND, max_candidates=3), tmp_path / "s", look)
    assert [len(names) for names in seen] == [1, 2, 3]


@pytest.mark.parametrize("family", ["falcon", "olmo2"])
def test_methods_are_those_that_a_family_can_have(tiny_model_dir, tmp_path, family):
    wanted = exploring(tiny_model_dir(family), tmp_path / "c", max_candidates=6)
    found = {one.method for one in explore(wanted, tmp_path / "s").candidates}
    has_awq = any(linear.source is not None for linear in decoder_layout(wanted.config).linears)
    assert found == set(Method) - (set() if has_awq else {Method.AWQ})


def test_an_ensemble(tiny_model_dir, tmp_path):
    """Its figures are means over the members."""
    model_dir = tiny_model_dir("llama")
    tails = {"base": None, "tail": make_tail(model_dir, tmp_path / "tail", "tail", 1, 0.5)}
    wanted = exploring(model_dir, tmp_path / "c", members={"tails": tails}, max_candidates=2)
    result = explore(wanted, tmp_path / "s")
    base, tail = read_parity(result.path).members
    assert result.chosen.kl == pytest.approx((base.kl + tail.kl) / 2) and base.kl != tail.kl
    assert Bundle.load(result.path).members == ("base", "tail")


def test_what_is_refused(exploration, found, tmp_path):
    _, out, _ = found
    with pytest.raises(ConfigError, match="a search of another model or with other settings"):
        explore(dataclasses.replace(exploration, settings={"model": "x"}), out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match="exists and is not a search"):
        explore(exploration, tmp_path / "other")
    with pytest.raises(ConfigError, match="more than 0 seconds, got 0"):
        explore(dataclasses.replace(exploration, seconds=0), tmp_path / "s")
    with pytest.raises(ConfigError, match=r"the fewest bits a weight that this model can have are 4.*the target is 2"):
        explore(dataclasses.replace(exploration, target=Target(bits=2)), tmp_path / "s")
    with pytest.raises(ConfigError, match="question 0 has 600 tokens and an answer of 1, and 512 are served"):
        explore(dataclasses.replace(exploration, questions=[Question([1] * 600, [1])]), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    with (out / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="another process searches"):
            explore(exploration, out)


def test_a_limit_that_nothing_keeps(exploration, tmp_path):
    """What was found is kept, and a failed first export leaves nothing that a later call minds."""
    wanted = dataclasses.replace(exploration, method=Method.ROUND, max_candidates=1)

    def fails(_path, _method, _target):
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        explore(dataclasses.replace(wanted, export=fails, settings={"typed": "wrong"}), tmp_path / "s")
    with pytest.raises(ConfigError, match=r"none of the 1 bundles.*KL of at most 1e-09.*'000-round.*search longer"):
        explore(dataclasses.replace(wanted, target=Target(kl=1e-9)), tmp_path / "s")
    assert "although none of" in json.loads((tmp_path / "s" / "report.json").read_text())["why"]
    assert explore(wanted, tmp_path / "s").path.is_dir()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../precious"},
        {"name": "/tmp"},
        {"name": ""},
        {"kl": None},
        {"kl": float("nan")},
        {"seconds": "1"},
        {"method": "none"},
        {"layer_kl": None},
        {"more": 1},
    ],
)
def test_damaged_candidates(exploration, tmp_path, change):
    out = tmp_path / "s"
    (tmp_path / "precious").mkdir()
    explore(dataclasses.replace(exploration, method=Method.ROUND, max_candidates=1), out)
    line = json.loads((out / "candidates.jsonl").read_text()) | change
    (out / "candidates.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(BundleError, match=r"candidates\.jsonl' is damaged"):
        explore(dataclasses.replace(exploration, method=Method.ROUND, max_candidates=1), out)
    assert (tmp_path / "precious").is_dir()


def test_a_bundle_that_was_removed(exploration, tmp_path):
    wanted = dataclasses.replace(exploration, method=Method.ROUND, max_candidates=1)
    shutil.rmtree(explore(wanted, tmp_path / "s").path)
    with pytest.raises(BundleError, match="lacks its bundle '000-round"):
        explore(wanted, tmp_path / "s")


def test_the_front():
    ones = [
        candidate("a", 10, 0.5),
        candidate("b", 20, 0.1),
        candidate("c", 20, 0.2),
        candidate("d", 30, 0.1),
        candidate("e", 9, 0.6),
    ]
    assert [one.name for one in front(ones)] == ["e", "a", "b"]


@pytest.mark.parametrize(
    ("target", "name", "why"),
    [
        (None, "b", "the smallest with a KL of at most 0.01"),
        (Target(kl=0.2), "a", "the smallest with a KL of at most 0.2"),
        (Target(megabytes=25), "b", "the least KL of those with at most 25 MB"),
        (Target(bits=4.5), "a", "the least KL of those with at most 4.5 bits"),
    ],
)
def test_the_choice(target, name, why):
    ones = [candidate("a", 10e6, 0.1, 4.25), candidate("b", 20e6, 0.009, 5.0), candidate("c", 30e6, 0.001, 8.0)]
    chosen, said = choose(ones, target)
    assert chosen.name == name and why in said


def test_answers_are_compared_with_those_of_the_engine(found):
    """The mean of the similarities of greedy answers of the same lengths."""
    result, out, _ = found
    with open_engine(out / result.chosen.name, SERVING) as engine:
        asked = ask(engine, engine.tokenizer, QUESTIONS)
        requests = [
            Request(
                str(index),
                (one.prompt,),
                engine.model.default_ensemble,
                SamplingParams(max_tokens=len(one.answer), temperature=0),
            )
            for index, one in enumerate(QUESTIONS)
        ]
        own = [choices[0].token_ids for choices in engine.complete(requests)]
        assert ask(engine, engine.tokenizer, []).rouge_l is None
    expected = [similarity(answer, one.answer) for answer, one in zip(own, QUESTIONS, strict=True)]
    assert asked.rouge_l == sum(expected) / 2


def test_a_context_that_is_too_short_for_the_codes(found):
    result, out, _ = found
    with open_engine(out / result.chosen.name, dataclasses.replace(SERVING, max_model_len=64)) as engine:
        assert ask(engine, engine.tokenizer, QUESTIONS).recall is None


def test_the_codes_are_looked_for_in_the_answers(found, monkeypatch):
    result, out, _ = found
    tokenizer = Tokenizer.from_dir(result.path)
    with open_engine(out / result.chosen.name, SERVING) as engine:
        monkeypatch.setattr(tokenizer, "decode", lambda _ids: " 0")
        assert ask(engine, tokenizer, []).recall == 0
        codes = iter([code for _, code in _recall(random.Random(0))])
        monkeypatch.setattr(tokenizer, "decode", lambda _ids: f" {next(codes)}.")
        assert ask(engine, tokenizer, []).recall == 1
