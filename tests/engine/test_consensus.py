"""Consensus: the drafts that are made, the one that is chosen, and what is refused."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.callers import CALLER
from helpers.fake_backend import ask, make_engine
from helpers.models import make_adapter
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.output import Completion
from motet.runtime.api.request import Ensemble, GenerateRequest, Member, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.engine.consensus import draft_requests, most_agreed, similarity
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError, InvalidRequestError
from motet.runtime.jobs.summarise import summarise
from motet.runtime.serve.service import Service
from motet.runtime.text.summary import SummariseParams

MIX = Ensemble((Member("a", 0.75), Member("b", 0.5), Member("c", -0.25)))
GREEDY = SamplingParams(temperature=0.0, seed=3, max_tokens=8, ignore_eos=True)


def longest_common(a, b):
    """Of all subsequences of a, in plain recursion."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


@pytest.mark.parametrize(
    ("a", "b"),
    [([1, 2, 3], [1, 2, 3]), ([1, 2, 3], [3, 2, 1]), ([1, 5, 2, 6, 3], [1, 2, 3]), ([1], [2]), ([4, 4], [4])],
)
def test_similarity_is_rouge_l(a, b):
    assert similarity(a, b) == similarity(b, a) == pytest.approx(2 * longest_common(a, b) / (len(a) + len(b)))


def test_similarity_of_random_texts():
    """Against the table of longest common subsequences."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (rng.integers(0, 4, rng.integers(1, 90)).tolist() for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        assert similarity(a, b) == pytest.approx(2 * table[-1, -1] / (len(a) + len(b)))


def test_empty_answers_are_alike():
    assert (similarity([], []), similarity([], [1])) == (1.0, 0.0)


def test_the_odd_one_out_is_not_chosen():
    drafts = [Completion("r", 0, 0, token_ids=ids) for ids in ([9, 9, 9], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 7, 4])]
    assert most_agreed(drafts) == 1
    assert most_agreed(drafts[:1]) == 0
    assert most_agreed([drafts[1], drafts[1]]) == 0


def test_drafts_are_of_the_ensemble_and_of_its_members():
    """Members with negative coefficients, which the mix is pushed away from, make none."""
    request = Request("r", ((1, 2),), MIX, replace(GREEDY, temperature=0.7), drafts=5)
    drafts = draft_requests(request)
    assert [[(m.name, m.mix) for m in draft.ensemble.members] for draft in drafts] == [
        [("a", 0.75), ("b", 0.5), ("c", -0.25)],
        [("a", 1.0)],
        [("b", 1.0)],
        [("a", 0.75), ("b", 0.5), ("c", -0.25)],
        [("a", 1.0)],
    ]
    assert len({draft.sampling.seed for draft in drafts}) == 5
    assert drafts[0].sampling.seed == 3


def test_what_no_drafts_can_be_made_of():
    with pytest.raises(InvalidRequestError, match=r"drafts is 4; a greedy answer has 3 different ones here"):
        draft_requests(Request("r", ((1,),), MIX, GREEDY, drafts=4))
    for fields in ({"drafts": 1}, {"drafts": 3, "sampling": SamplingParams(n=2)}):
        with pytest.raises(InvalidRequestError, match="2 drafts or more"):
            GenerateRequest("x", **fields)
    with pytest.raises(InvalidRequestError, match="a confidence is the ensemble's"):
        GenerateRequest("x", drafts=2, return_confidence=True)
    with pytest.raises(InvalidRequestError, match="drafts must be"):
        GenerateRequest("x", drafts=-1)
    with pytest.raises(ConfigError, match="drafts must be 0"):
        SummariseParams(drafts=1)


def test_the_service_answers_with_one_of_the_drafts(tokenizer):
    async def run(request):
        service = Service(engine)
        outputs = [output async for output in service.generate(request, CALLER)]
        return outputs, await service.complete(request, CALLER)

    with make_engine(tokenizer, max_num_seqs=8) as engine:
        request = GenerateRequest("hello", Ensemble((Member("a", 0.5), Member("b", 0.5))), sampling=GREEDY, drafts=3)
        outputs, whole = asyncio.run(run(request))
        prompt = tuple(tokenizer.encode("hello"))
        own = [
            engine.complete([ask(str(i), prompt, ensemble=e, max_tokens=8)])[0][0].token_ids
            for i, e in enumerate((request.ensemble, Ensemble((Member("a", 1.0),)), Ensemble((Member("b", 1.0),))))
        ]
        with pytest.raises(InvalidRequestError, match="the engine makes one answer"):
            engine.complete([replace(ask("x"), drafts=2)])
        with pytest.raises(InvalidRequestError, match="a greedy answer has 3 different ones"):
            asyncio.run(run(replace(request, drafts=4)))
        assert engine.is_idle
    (output,) = outputs
    assert output.token_ids == own[most_agreed([Completion("r", 0, 0, token_ids=ids) for ids in own])]
    assert (output.finish_reason, output.seed, output.usage.completion_tokens) == ("length", 3, 8)
    assert [choice.token_ids for choice in whole] == [output.token_ids]


def test_a_job_chooses_each_summary(tiny_model_dir, tmp_path):
    lora = make_adapter(tiny_model_dir("llama"), tmp_path / "x", 1, layers=2)
    path = export_bundle(tiny_model_dir("llama"), tmp_path / "b", tails={"a": None}, loras={"b": lora}, graphs=False)
    texts = tmp_path / "in"
    texts.mkdir()
    for index in range(3):
        (texts / f"{index}.txt").write_text(f"text {index}")
    mix = Ensemble((Member("a", 0.5), Member("b", 0.5)))
    params = SummariseParams(instruction="", max_summary_tokens=6, chunk_tokens=60, drafts=3)
    with Engine.from_bundle(path, EngineConfig(max_num_seqs=8, threads=2)) as engine:
        with pytest.raises(InvalidRequestError, match="a greedy answer has 3 different ones"):
            summarise(engine, texts, tmp_path / "out.jsonl", ensemble=mix, params=replace(params, drafts=4))
        assert not (tmp_path / "out.jsonl").exists()
        report = summarise(engine, texts, tmp_path / "out.jsonl", ensemble=mix, params=params)
        summarise(engine, texts, tmp_path / "plain.jsonl", ensemble=mix, params=replace(params, drafts=0))
    assert (report.done, report.failed) == (3, 0), (tmp_path / "out.jsonl").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    plain = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {line["id"] for line in plain}
    assert {line["key"] for line in lines}.isdisjoint(line["key"] for line in plain)  # another setting, another key
