"""The trunk cache: nothing stale, nothing torn, bounded; and what trials train from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers.compare import relative_error
from motet.finetune.data.batches import Item, make_batch
from motet.finetune.data.encode import Encoded
from motet.finetune.params import TuneParams
from motet.finetune.training.methods import make_trunk
from motet.finetune.training.train import tune
from motet.finetune.training.trunk_cache import TrunkCache, run_trunk
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.errors import ConfigError, UnavailableError

ITEMS = [Encoded(tuple(range(5 + i, 25 + 2 * i)), 10 + i % 3, str(i)) for i in range(20)]

WRITER = """
import sys, time
from pathlib import Path
from motet.finetune.data.encode import Encoded
from motet.finetune.training.methods import make_trunk
from motet.finetune.training.trunk_cache import TrunkCache
from motet.runtime.checkpoints.huggingface import read_config, read_weights
model, root = Path(sys.argv[1]), Path(sys.argv[2])
items = [Encoded(tuple(range(5 + i, 25 + 2 * i)), 10 + i % 3, str(i)) for i in range(20)]
def tick(count):
    if count:
        print(count, flush=True)
        time.sleep(float(sys.argv[3]))
TrunkCache(root).hidden(lambda: make_trunk(read_config(model), read_weights(model)), "digest", 2, items, tick)
"""


@pytest.fixture
def trunk(tiny_model_dir):
    model_dir = tiny_model_dir("llama")
    return make_trunk(read_config(model_dir), read_weights(model_dir))


def never():
    raise AssertionError("the trunk was computed though the cache has it")


def test_a_hit_is_what_was_computed(trunk, tmp_path):
    cache = TrunkCache(tmp_path)
    first = cache.hidden(lambda: trunk, "digest", 2, ITEMS)
    again = cache.hidden(never, "digest", 2, ITEMS)
    for item, a, b in zip(ITEMS, first, again):
        expected = run_trunk(trunk, [item], 2)[0]
        assert torch.equal(a, b)
        assert a.shape == expected.shape
        assert (a.float() - expected.float()).abs().mean() < 1e-4 * expected.float().std()  # in any batch


def test_nothing_stale_is_hit(trunk, tmp_path):
    cache = TrunkCache(tmp_path)
    cache.hidden(lambda: trunk, "digest", 2, ITEMS)
    changed = [Encoded((7, *ITEMS[0].token_ids[1:]), ITEMS[0].answer, "0"), *ITEMS[1:]]
    for digest, split, items in (
        ("other", 2, ITEMS),
        ("digest", 1, ITEMS),
        ("digest", 2, changed),
        ("digest", 2, ITEMS[1:]),
    ):
        with pytest.raises(AssertionError, match="computed"):
            cache.hidden(never, digest, split, items)


def test_a_later_split_goes_on_from_an_earlier_one(trunk, tmp_path):
    direct = TrunkCache(tmp_path / "a").hidden(lambda: trunk, "digest", 3, ITEMS)
    cache = TrunkCache(tmp_path / "b")
    cache.hidden(lambda: trunk, "digest", 1, ITEMS)
    assert all(torch.equal(a, b) for a, b in zip(direct, cache.hidden(lambda: trunk, "digest", 3, ITEMS)))


def test_damage_is_noticed_and_computed_again(trunk, tmp_path):
    cache = TrunkCache(tmp_path)
    first = [rows.clone() for rows in cache.hidden(lambda: trunk, "digest", 2, ITEMS)]
    (data,) = tmp_path.glob("*/hidden.bin")
    with data.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\xff")
    assert all(torch.equal(a, b) for a, b in zip(first, cache.hidden(lambda: trunk, "digest", 2, ITEMS)))


def test_the_bound(trunk, tmp_path):
    with pytest.raises(ConfigError, match="--cache-gb"):
        TrunkCache(tmp_path, max_bytes=1000).hidden(lambda: trunk, "digest", 2, ITEMS)
    size = 2 * 64 * sum(len(item.token_ids) - 1 for item in ITEMS)
    cache = TrunkCache(tmp_path, max_bytes=2 * size + 20_000)
    for split in (1, 2, 3):
        cache.hidden(lambda: trunk, f"digest {split}", split, ITEMS)
    assert len(list(tmp_path.glob("*/index.json"))) == 2  # the least recently used one is gone
    cache.hidden(never, "digest 3", 3, ITEMS)


@pytest.mark.slow
@pytest.mark.alone
def test_killed_while_writing(tiny_model_dir, tmp_path, trunk):
    """kill -9 after the first chunk: the next writer keeps it, and the entry is the one that an unharmed writer makes."""
    model_dir = tiny_model_dir("llama")
    command = [sys.executable, "-c", WRITER, str(model_dir), str(tmp_path / "killed")]
    writer = subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "8\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    (journal,) = (tmp_path / "killed").glob("*.partial/journal")
    with journal.open("a") as file:
        file.write('{"bytes": 12')  # and it died in a line
    result = subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["8", "8", "4"]  # 8 were kept, 12 computed
    whole = TrunkCache(tmp_path / "whole").hidden(lambda: trunk, "digest", 2, ITEMS)
    kept = TrunkCache(tmp_path / "killed").hidden(never, "digest", 2, ITEMS)
    assert all(torch.equal(a, b) for a, b in zip(whole, kept))


@pytest.mark.slow
def test_a_full_disk(tiny_model_dir, tmp_path):
    """A file-size limit stands for the full disk: a clear error, and the next run goes on."""
    code = (
        WRITER.replace("TrunkCache(root).hidden", "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))\nTrunkCache(root).hidden")
    )  # fmt: skip
    command = [str(tiny_model_dir("llama")), str(tmp_path), "0"]
    full = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert full.returncode != 0
    assert f"{UnavailableError.__name__}: the trunk cache at" in full.stderr
    assert "what is written is kept" in full.stderr
    again = subprocess.run([sys.executable, "-c", WRITER, *command], capture_output=True, text=True, check=True)
    assert again.stdout.split()[0] == "8"
    assert len(list(tmp_path.glob("*/index.json"))) == 1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
def test_only_the_answers_positions(tiny_model_dir, family):
    """The last layer at the answers' positions alone is the whole decoder at those positions."""
    decoder = Decoder.from_dir(tiny_model_dir(family)).double()
    batch = make_batch([Item(item) for item in ITEMS[:5]])
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(i.encoded.token_ids[:-1]) for i in batch.items], batch_first=True
    )
    with torch.no_grad():
        expected = decoder(tokens)
        hidden = decoder.run_layers(decoder.embed(tokens), 0, 2)
        found = decoder.head(decoder.norm(decoder.run_layers(hidden, 2, 4, positions=batch.positions)))
    for row in range(5):
        wanted = batch.targets[row] >= 0
        at = batch.positions[row][wanted]
        assert relative_error(found[row][wanted], expected[row][at]) < 1e-10  # float64


@pytest.mark.slow
def test_cached_and_uncached_train_alike(tiny_model_dir, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"say {i}", "completion": f"it is {i % 3}"}) + "\n" for i in range(40))
    )
    params = TuneParams(examples=24, validation_examples=6, max_length=100, batch_tokens=256)
    curves = []
    for name, use_cache in (("a", True), ("b", False)):
        manifest = tune(
            tiny_model_dir("llama"), str(path), tmp_path / name, params=params, cache=TrunkCache(tmp_path / "cache"),
            use_cache=use_cache, show_progress=False,
        )  # fmt: skip
        curves.append(torch.tensor(manifest["metrics"]["loss_curve"]))
    assert (curves[0] - curves[1]).abs().max() < 1e-3
