"""Requests go to the replica that has the least to compute before the first token. No Ray is needed for it."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.fake_backend import ask
from motet.runtime.cluster.routing import PrefixRouting, block_keys, pack_keys
from motet.runtime.cluster.settings import ClusterSettings
from motet.runtime.errors import ConfigError
from motet.runtime.schedule.prefix import extend_digests

SIZE = 8


def published(version, tokens=0, prompts=()):
    digests = []
    for prompt in prompts:
        own = []
        extend_digests(own, b"", np.array(prompt, np.int64), len(prompt) // SIZE, SIZE)
        digests += own
    return {"version": version, "keys": pack_keys(digests), "tokens": tokens, "block_size": SIZE}


def test_keys_are_those_of_the_cache_without_the_last_token():
    prompt = tuple(range(33))
    assert len(block_keys(ask("r", prompt), SIZE)) == 4
    assert len(block_keys(ask("r", prompt[:32]), SIZE)) == 3
    assert block_keys(ask("r", prompt), SIZE) != block_keys(ask("r", prompt, cache_salt=b"x"), SIZE)


def test_the_longest_cached_prefix_wins_until_its_replica_is_busy():
    prompt = tuple(range(100))
    routing = PrefixRouting()
    routing.update(
        {"a": published(0), "b": published(0, prompts=[prompt[:40]]), "c": published(0, prompts=[prompt[8:40]])}
    )
    assert routing.rank(ask("r", prompt)) == ["b", "a", "c"]
    routing.update({"a": published(1), "b": published(1, 41, [prompt[:40]]), "c": published(1)})
    assert routing.rank(ask("r", prompt))[0] == "a"


def test_what_was_sent_counts_before_it_is_published():
    prompt = tuple(range(100))
    routing = PrefixRouting()
    routing.update({"a": published(0), "b": published(0)})
    routing.sent("a", "1", ask("r", prompt))
    assert routing.rank(ask("other", (7,) * 50)) == ["b", "a"]
    routing.ended("a", "1")
    assert routing.rank(ask("other", (7,) * 50)) == ["a", "b"]
    assert routing.rank(ask("again", prompt))[0] == "a"
    routing.update({"a": published(1, tokens=10), "b": published(1)})  # sent from elsewhere
    assert routing.rank(ask("short", (1, 2, 3)))[0] == "b"


def test_replicas_come_and_go():
    routing = PrefixRouting()
    assert routing.rank(ask("r")) == []
    routing.update({"a": {}, "b": published(0)})  # one has not published anything yet
    assert set(routing.rank(None)) == {"a", "b"}
    routing.update({"b": published(0)})
    routing.sent("a", "1", ask("r"))  # it ended meanwhile
    assert routing.rank(ask("r")) == ["b"]


def test_settings():
    assert ClusterSettings("auto", 2).most == 2
    for wrong in ({"replicas": 0}, {"replicas": 3, "max_replicas": 2}, {"queued_tokens": 0}):
        with pytest.raises(ConfigError, match="replicas must be"):
            ClusterSettings("auto", **wrong)
