"""A search for the bundles that are worth their bytes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from motet.export.base_model import BaseModel
from motet.export.bundle_writer import export_bundle
from motet.export.exploration import explore as module
from motet.export.exploration.answers import Question, ask
from motet.export.exploration.candidate import Candidate, choose, front
from motet.export.exploration.explore import Exploration, explore
from motet.export.parity import HeldOut, read_parity
from motet.export.quantisation.calibration import Calibration
from motet.export.quantisation.method import Method, Target
from motet.export.quantisation.quantiser import plan_bits
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.open import open_backend
from motet.runtime.engine.consensus import similarity
from motet.runtime.engine.open import open_engine
from motet.runtime.errors import BundleError, ConfigError
from motet.runtime.model.bundle import Bundle
from motet.runtime.text.tokenizer import Tokenizer

CHUNKS = [np.random.default_rng(seed).integers(0, 256, 64).tolist() for seed in range(8)]
HELD_OUT = [np.random.default_rng(100).integers(0, 256, 64).tolist()]
QUESTIONS = [Question((1, 2, 3, 4), (5, 6, 7)), Question((9, 8), (7,))]
SERVING = EngineConfig(threads=2)


def candidate(name, num_bytes, kl, bits=4.0, method=Method.GPTQ):
    return Candidate(name, method, bits, bits, num_bytes, kl, kl, 0.0, 1.0, 0.5, None, 1.0, 1.0, (kl,), 1.0)


@pytest.fixture(scope="module")
def exploration(tiny_model_dir, tmp_path_factory):
    model = BaseModel(tiny_model_dir("llama"))
    text = Calibration(CHUNKS, tmp_path_factory.mktemp("calibration"))

    def export(path, method, target):
        held_out = HeldOut(HELD_OUT, SERVING)
        return export_bundle(model, path, method=method, target=target, calibration=text, held_out=held_out)

    return Exploration(
        model.config, export, {"model": model.digest}, 1e6, questions=QUESTIONS, serving=SERVING, max_candidates=8
    )


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
        answers = ask(engine, Tokenizer.from_dir(out / one.name), QUESTIONS)
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


def test_a_time_that_is_over_makes_one(exploration, tmp_path):
    result = explore(dataclasses.replace(exploration, seconds=1e-9, method=Method.ROUND), tmp_path / "s")
    assert len(result.candidates) == 1 and result.chosen.method is Method.ROUND


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
    (tmp_path / "damaged").mkdir()
    module._open(exploration, tmp_path / "damaged")
    (tmp_path / "damaged" / "candidates.jsonl").write_text("{}\n")
    with pytest.raises(BundleError, match=r"candidates\.jsonl' is damaged"):
        explore(exploration, tmp_path / "damaged")


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
        (Target(kl=1e-6), "c", "none of 3 has a KL of at most"),
        (Target(megabytes=25), "b", "the least KL of those with at most 25 MB"),
        (Target(bits=4.5), "a", "the least KL of those with at most 4.5 bits"),
        (Target(bits=3), "a", "none of 3"),
    ],
)
def test_the_choice(target, name, why):
    ones = [candidate("a", 10e6, 0.1, 4.25), candidate("b", 20e6, 0.009, 5.0), candidate("c", 30e6, 0.001, 8.0)]
    chosen, said = choose(ones, target)
    assert chosen.name == name and why in said


def test_questions_are_answered_as_they_are_counted(found):
    """The mean of the similarities of greedy answers of the same lengths."""
    result, out, _ = found
    with open_engine(out / result.chosen.name, SERVING) as engine:
        asked = ask(engine, Tokenizer.from_dir(out / result.chosen.name), QUESTIONS)
        own = ask(engine, Tokenizer.from_dir(out / result.chosen.name), [])
    assert own.rouge_l is None and own.recall == asked.recall
    assert 0 <= asked.recall <= 1 and 0 <= asked.rouge_l <= 1
    assert similarity((1, 2, 3), (1, 3)) == pytest.approx(0.8)
