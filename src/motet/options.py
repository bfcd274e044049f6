"""Options that several commands share, and options that are made from the table of sampling parameters."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from .parameter_options import with_parameters
from .runtime.api.config import EngineConfig
from .runtime.api.request import Ensemble, Member, Space
from .runtime.api.rules import Biases, Flag, Integer, Number, Rule, Strings, TokenIds
from .runtime.api.sampling import DEFAULTS, HELP, RULES, SamplingParams
from .runtime.api.structure import Structure
from .runtime.errors import ConfigError, InvalidEnsembleError, InvalidRequestError
from .runtime.model.generation import recommended_sampling
from .runtime.text.documents import decode_text, read_document

DEFAULT_ADDRESS = "127.0.0.1:50051"
Command = TypeVar("Command", bound=Callable[..., Any])
Value = TypeVar("Value")

Bundle = Annotated[Path | None, typer.Option(help="Serve from this bundle in this process.")]
Address = Annotated[str | None, typer.Option(help=f"A server's host:port; default: {DEFAULT_ADDRESS}.")]
KEY_VARIABLE = "MOTET_KEY"  # of the environment: a key on a command line is seen by every user of the machine
Tls = Annotated[
    bool,
    typer.Option("--tls", help=f"Encrypt; the system's authorities vouch for the server. {KEY_VARIABLE} has the key."),
]
Ca = Annotated[Path | None, typer.Option(help="Encrypt; these authorities vouch for the server (PEM).")]
Cert = Annotated[Path | None, typer.Option(help="This client's certificate, for a server that asks for one (PEM).")]
CertKey = Annotated[Path | None, typer.Option(help="The private key of --cert (PEM).")]
# How to reach a server, for `with_options`.
CONNECTION: dict[str, tuple[Any, Any]] = {
    "address": (Address, None),
    "tls": (Tls, False),
    "ca": (Ca, None),
    "cert": (Cert, None),
    "cert_key": (CertKey, None),
}
Defaults = Annotated[
    Literal["motet", "model"],
    typer.Option(
        help="Of the sampling options that are left out: as printed here, or what generation_config.json of --bundle says."
    ),
]
MixOption = Annotated[
    str | None,
    typer.Option(help="name=coefficient,… or name=coefficient@temperature,…; default: the bundle's own mix."),
]
SpaceOption = Annotated[Space | None, typer.Option(help="Where the members of --mix are mixed; default: logits.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads; 0: the CPUs this process may use.")]
# For every command that reads a bundle: its parameter `trust` is an `EngineConfig` with what the bundle's signature must be.
with_signature = with_parameters("trust", EngineConfig(), only=("verify_key", "verify_ca"))


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises `DataError` for an argument that is not UTF-8."""
    for index, argument in enumerate(arguments, 1):
        decode_text(os.fsencode(argument), f"argument {index}, '{ascii(argument)[1:-1]}',")


def read_mix(text: str) -> dict[str, tuple[float, float]]:
    """Member → (coefficient, temperature) of "name=coefficient,…", where a coefficient may have "@temperature" after it; without,
    the temperature is 1. Raises `InvalidEnsembleError`."""
    parts: dict[str, tuple[float, float]] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        coefficient, is_tempered, temperature = value.partition("@")
        if name.strip() in parts:
            raise InvalidEnsembleError(f"a mix names a member once; '{name.strip()}' is there twice")
        try:
            parts[name.strip()] = float(coefficient), float(temperature) if is_tempered else 1.0
        except ValueError:
            raise InvalidEnsembleError(
                f"a mix is name=coefficient,… or name=coefficient@temperature,…; '{item}' is not"
            ) from None
    return parts


def by_name(members: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """Member → what belongs to it. Raises `InvalidEnsembleError` for a name that is given twice."""
    found: dict[str, Value] = {}
    for name, value in members:
        if name in found:
            raise InvalidEnsembleError(f"two members are called '{name}'; give each a name of its own")
        found[name] = value
    return found


def read_ensemble(mix: str | None, space: Space | None) -> Ensemble | None:
    """The ensemble of --mix and --space; None, the bundle's own, without --mix. Raises `InvalidEnsembleError`."""
    if mix is None:
        if space is not None:
            raise InvalidEnsembleError("--space is where the members of --mix are mixed; give --mix too")
        return None
    members = tuple(Member(name, c, temperature=t) for name, (c, t) in read_mix(mix).items())
    return Ensemble(members, Space.LOGITS if space is None else space)


def with_options(options: Mapping[str, tuple[Any, Any]]) -> Callable[[Command], Command]:
    """Decorate a command whose last parameter is `**values`, to which these options are passed by name. An option is
    (type, `typer.Option`), which Typer reads from the command's signature."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=option)
            for name, (kind, option) in options.items()
        ]
        command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return command

    return decorate


# Rule → the type of its option, and the name of a value in the help.
_OPTION_TYPES: Mapping[type[Rule], tuple[Any, str | None]] = {
    Integer: (int, None),
    Number: (float, None),
    Flag: (bool, None),
    Strings: (list[str], "TEXT"),
    TokenIds: (list[int], "ID"),
    Biases: (list[str], "ID=NUMBER"),
}


def sampling_options(*, without: Collection[str] = (), **defaults: Any) -> dict[str, tuple[Any, Any]]:
    """An option for each field of `SamplingParams`, for `with_options`. `defaults`: defaults that differ from the
    field's, by name. `without`: fields to leave out."""
    options = {}
    for name, rule in RULES.items():
        if name in without:
            continue
        kind, metavar = _OPTION_TYPES[type(rule)]
        help = HELP[name]
        if isinstance(rule, Strings | TokenIds | Biases):
            kind, default, help = kind | None, None, f"{help} May be given several times."
        else:
            default = defaults.get(name, DEFAULTS[name])
            kind = kind | None if default is None else kind
        options[name] = (kind, typer.Option(default, help=help, metavar=metavar))
    return options


STRUCTURE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "json_schema": (Path | None, typer.Option(None, help="The answer is JSON that this schema, a file, describes.")),
    "json_object": (bool, typer.Option(False, "--json-object", help="The answer is a JSON object.")),
    "regex": (str | None, typer.Option(None, help="The answer is text that this regular expression matches.")),
    "grammar": (Path | None, typer.Option(None, help="The answer is text of this grammar, a file in Lark's syntax.")),
    "choice": (
        list[str] | None,
        typer.Option(None, help="The answer is this text, or another one. May be given several times."),
    ),
}


def take_structure(values: dict[str, Any]) -> Structure | None:
    """Remove the values of `STRUCTURE_OPTIONS`; what they say. Raises `ConfigError` for more than one of them, and what
    `Structure` and `read_document` raise."""
    given = {name: value for name in STRUCTURE_OPTIONS if (value := values.pop(name))}
    if len(given) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"an answer has one structure, and {options} are given; leave one out")
    for name, value in given.items():
        if name == "json_object":
            return Structure.json_object()
        make: Callable[[Any], Structure] = getattr(Structure, name)
        return make(read_document(value) if isinstance(value, Path) else value)
    return None


def given_options(context: typer.Context) -> set[str]:
    """Names of the parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def read_sampling(
    values: Mapping[str, Any], context: typer.Context, defaults: str, bundle: Path | None, trust: EngineConfig
) -> SamplingParams:
    """`SamplingParams` from the values of these options; None means the default. With `defaults` "model", what the
    bundle recommends comes before the options' own defaults, once it has the signature that `trust` asks for. Raises
    `InvalidRequestError`, `ConfigError`, and what `check_signature` and `recommended_sampling` raise."""
    if defaults == "model":
        if bundle is None:
            raise ConfigError("--defaults model reads the bundle's generation_config.json; give --bundle too")
        from .runtime.engine.open import check_signature

        check_signature(bundle, trust)
        on_line = given_options(context)
        recommended = recommended_sampling(bundle)
        values = {**values, **{name: value for name, value in recommended.items() if name not in on_line}}
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        if isinstance(RULES[name], Biases):
            given[name] = dict(_bias(name, item) for item in value)
    return SamplingParams(**given)


def _bias(name: str, text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError:
        option = f"--{name.replace('_', '-')}"
        raise InvalidRequestError(f"{option} takes ID=NUMBER, got '{text}'", field=name) from None


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; the result is called with how many have ended, of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)
        yield lambda ended, total: progress.update(task, completed=ended, total=total)
