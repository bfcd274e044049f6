"""Options of a command that are made from a dataclass: names, defaults, conversion, errors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest
import typer
from motet import finetune_cli
from motet.finetune.params import TuneParams
from motet.finetune.search.params import FuseParams, SearchParams
from motet.parameter_options import with_parameters
from motet.runtime.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    size: int = field(default=3, metadata={"help": "A size."})
    rate: float = field(default=0.5, metadata={"help": "A rate.", "option": "speed"})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "A kind."})
    sizes: tuple[int, ...] = field(default=(1, 2), metadata={"help": "Sizes."})
    hidden: int = 7


def called(command, *arguments):
    app = typer.Typer()
    app.command()(command)
    return app(list(map(str, arguments)), standalone_mode=False)


def command(**keywords):
    @with_parameters("settings", Settings(hidden=8), **keywords)
    def run(name: str, settings: Settings, times: int = 1) -> tuple[str, Settings, int]:
        return name, settings, times

    return run


def test_without_options_the_defaults_are_kept():
    assert called(command(), "x") == ("x", Settings(hidden=8), 1)


def test_every_option_reaches_its_field():
    options = ("--size", 5, "--speed", 0.25, "--kind", "b", "--sizes", "4, 5,6", "--times", 2)
    assert called(command(), "x", *options) == ("x", Settings(5, 0.25, "b", (4, 5, 6), 8), 2)


@pytest.mark.parametrize(
    "options", [("--rate", 1), ("--hidden", 1), ("--settings", 1), ("--kind", "c"), ("--size", "much")]
)
def test_other_options_and_values_are_refused(options):
    with pytest.raises(typer.BadParameter.__base__):
        called(command(), "x", *options)


def test_only_limits_the_options():
    assert called(command(only=("size",)), "x", "--size", 4)[1] == Settings(4, hidden=8)
    with pytest.raises(typer.BadParameter.__base__):
        called(command(only=("size",)), "x", "--kind", "b")


def test_a_tuple_of_numbers_takes_numbers():
    with pytest.raises(ConfigError, match="'1,b' is not a list of int"):
        called(command(), "x", "--sizes", "1,b")


def test_commands_take_the_dataclasses_own_defaults(monkeypatch, tmp_path):
    """Nothing but the field's declaration says what an option's default is."""
    given = {}
    monkeypatch.setattr(
        "motet.finetune.training.train.tune", lambda *_args, params, **_fields: given.update(tune=params)
    )
    monkeypatch.setattr("motet.finetune.training.train.Workbench", lambda *_args: None)
    monkeypatch.setattr(
        "motet.finetune.search.search.search", lambda _bench, _out, params, **_fields: given.update(search=params)
    )
    monkeypatch.setattr(
        "motet.finetune.search.fuse.fuse", lambda _bench, _members, _out, params, **_fields: given.update(fuse=params)
    )
    monkeypatch.setattr("motet.runtime.checkpoints.store.resolve_model", lambda model: model)
    for name, default in (("tune", TuneParams()), ("search", SearchParams()), ("fuse", FuseParams())):
        with pytest.raises((TypeError, AttributeError)):  # the fake has no result to print
            called(getattr(finetune_cli, name), "model", "--data", "data", "--out", tmp_path)
        assert given[name] == default
        assert dataclasses.is_dataclass(given[name])
