"""What trains no projector, or holds none that can be used, is refused; the command, and others that meet such a directory."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.colours import TRAINING, train_on_pictures
from motet.cli import app
from motet.export.prune.params import PruneParams
from motet.export.prune.prune import prune
from motet.finetune.params import TuneParams
from motet.finetune.projector_params import ProjectorParams
from motet.finetune.training.train import tune
from motet.runtime.checkpoints.encoders import encoder_pages, read_encoders
from motet.runtime.checkpoints.huggingface import checkpoint_digest
from motet.runtime.checkpoints.store import pull
from motet.runtime.errors import BundleError, ConfigError, DataError, NotFoundError, UnsupportedModelError
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow


def test_settings_that_train_nothing_are_refused(seeing, tmp_path):
    folder, _ = seeing
    for changes, match in (
        ({"layers": 2}, "layers is of the model's layers"),
        ({"head": True}, "head is of the model's layers"),
        ({"rank": 4}, "rank is a setting of adapters"),
    ):
        with pytest.raises(ConfigError, match=match):
            TuneParams(method="projector", **changes)
    with pytest.raises(ConfigError, match="makes a model with an encoder"):
        tune(
            folder / "base",
            str(folder / "data.jsonl"),
            tmp_path / "x",
            params=TuneParams(**TRAINING),
            show_progress=False,
        )
    for options, match in (
        ({"encoders": {"audio": folder / "tower"}}, "is an encoder of image"),
        ({"encoders": {"smell": folder / "tower"}}, "an encoder is of image or audio"),
        ({"encoders": {}, "projector": ProjectorParams()}, "has no encoders.json"),
        ({"encoders": {}}, "pool is of a new projector"),
        ({"projector": ProjectorParams(pool=2)}, "no multiple of"),
        ({"params": TuneParams(method="lora")}, "trains no projector"),
        ({"encoders": {}, "projector": ProjectorParams(placeholder="<image>")}, "the base's own keep theirs"),
        ({"projector": ProjectorParams(placeholder="of")}, "must be one token"),
        ({"projector": ProjectorParams(placeholder="<|im_start|>")}, "must be one token"),
    ):
        with pytest.raises(ConfigError, match=match):
            train_on_pictures(folder, "no", **options)
    with pytest.raises(ConfigError, match="is not a model whose projector"):
        train_on_pictures(folder, "pictures")
    with pytest.raises(ConfigError, match="would replace it"):
        train_on_pictures(folder, "seeing", projector=ProjectorParams(), encoders={"image": folder / "seeing"})
    assert not (folder / "no").exists()


def test_data_that_trains_nothing_is_refused(seeing):
    folder, _ = seeing
    lines = (folder / "data.jsonl").read_text().splitlines()
    texts = [json.dumps({"prompt": "x", "completion": "y", "id": f"text {i}"}) for i in range(4)]
    (folder / "texts.jsonl").write_text("\n".join([*lines, *texts]) + "\n")
    with pytest.raises(DataError, match=r"the example from 'text \d' has no image"):
        train_on_pictures(folder, "no", data="texts.jsonl")
    broken = json.loads(lines[0])
    (folder / "broken.png").write_bytes((folder / "pictures" / "red-1.png").read_bytes()[:200])
    (folder / "broken.jsonl").write_text(
        "\n".join([*lines, json.dumps({**broken, "image": "broken.png", "id": "b"})]) + "\n"
    )
    with pytest.raises(DataError, match=r"broken.png.*damaged or cut off"):
        train_on_pictures(folder, "no", data="broken.jsonl")
    with pytest.raises(DataError, match="has no encoder of image"):
        tune(folder / "base", str(folder / "data.jsonl"), folder / "no", show_progress=False, use_cache=False)


def test_damaged_directories_are_refused(seeing, tmp_path):
    folder, _ = seeing
    other = tmp_path / "other"
    shutil.copytree(folder / "seeing", other)
    entries = json.loads((other / "encoders.json").read_text())
    for values, match in (
        ([], "must hold a JSON object"),
        ({"format": 9, "encoders": {}}, "must have format 1"),
        ({"format": 1, "encoders": {"smell": {}}}, "encoders of"),
        ({"format": 1, "encoders": {"image": {"x": 1}}}, "is inconsistent"),
    ):
        (other / "encoders.json").write_text(json.dumps(values))
        with pytest.raises(BundleError, match=match):
            read_encoders(other)
    (other / "encoders.json").write_text(json.dumps(entries).replace('"num_layers": 2', '"num_layers": 1000000'))
    with pytest.raises(BundleError, match="1000000 layers"):
        encoder_pages(other)
    (other / "encoders.json").write_text(json.dumps(entries))
    tensors = load_file(other / "encoder-image.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "projector.0.bias"}, other / "encoder-image.safetensors")
    with pytest.raises(BundleError, match=r"projector\.0\.bias"):
        encoder_pages(other)
    content = (folder / "seeing" / "encoder-image.safetensors").read_bytes()
    (other / "encoder-image.safetensors").write_bytes(content[:-100])
    with pytest.raises(BundleError, match="damaged"):
        encoder_pages(other)


def test_other_commands_know_the_directory(seeing, tmp_path, monkeypatch):
    """A pull copies the encoder too; pruning would leave it out, and is refused."""
    folder, _ = seeing
    monkeypatch.setenv("MOTET_HOME", str(tmp_path))
    copy = pull(str(folder / "seeing"), show_progress=False)
    assert checkpoint_digest(copy) == checkpoint_digest(folder / "seeing")
    assert encoder_pages(copy).keys() == {"image"}
    (folder / "seeing" / "encoder-image.safetensors").rename(tmp_path / "aside")
    try:
        for reads in (checkpoint_digest, encoder_pages):
            with pytest.raises(NotFoundError, match="names its encoder"):
                reads(folder / "seeing")
    finally:
        (tmp_path / "aside").rename(folder / "seeing" / "encoder-image.safetensors")
    with pytest.raises(UnsupportedModelError, match="only models of text are pruned"):
        prune(folder / "seeing", tmp_path / "pruned", PruneParams(layers=3))


def test_the_command(seeing, capsys):
    """Options reach the run; those of encoders are refused by other methods."""
    folder, _ = seeing
    options = [
        "--data",
        str(folder / "data.jsonl"),
        "--cache",
        str(folder / "cache"),
        "--epochs",
        "1",
        "--evaluations",
        "1",
    ]
    called = ["tune", str(folder / "base"), "--out", str(folder / "called"), *options]
    tower = f"image={folder / 'tower'}"
    own = [
        "--encoder",
        tower,
        "--pool",
        "3",
        "--placeholder",
        "<audio>",
        "--projector",
        "linear",
        "--precision",
        "bf16",
    ]
    app([*called, "--method", "projector", *own], standalone_mode=False)
    assert "nats per token" in capsys.readouterr().out
    encoder = read_encoders(folder / "called")["image"]
    assert (encoder.token, encoder.projector, encoder.rows_per_tile) == ("<audio>", "linear", 1)
    for more, match in (
        (["--method", "tail", "--pool", "3"], "pool: method 'tail' trains no encoder"),
        (["--encoder", tower], "encoder: method 'tail' trains no encoder"),
        (["--method", "projector", "--encoder", str(folder / "tower")], "takes image=SOURCE"),
        (["--method", "projector", "--encoder", tower, "--encoder", tower], "each once"),
    ):
        with pytest.raises(ConfigError, match=match):
            app([*called, *more], standalone_mode=False)
