"""`with_parameters`: options of a command, made from the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from .runtime.errors import ConfigError


def with_parameters(
    parameter: str, defaults: Any, only: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replace `parameter` of a command by one option per field of `defaults`, a dataclass instance.

    The command is called with a copy of `defaults` that has the options' values; the dataclass checks them. A field
    is an option if its metadata has a "help" text; "option" in the metadata is the option's name if it is not the
    field's. `only` limits the fields. A tuple is written as one text with commas; the command raises `ConfigError` if
    an element does not have the tuple's type.
    """
    types = get_type_hints(type(defaults))
    fields = [f for f in dataclasses.fields(defaults) if "help" in f.metadata and (not only or f.name in only)]
    options = [_option(field, types[field.name], getattr(defaults, field.name)) for field in fields]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            changes = {option.name: _value(values.pop(option.name), types[option.name]) for option in options}
            return command(**values, **{parameter: dataclasses.replace(defaults, **changes)})

        signature = inspect.signature(command, eval_str=True)
        others = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != parameter]
        run.__annotations__ = {p.name: p.annotation for p in (*others, *options)}
        run.__dict__["__signature__"] = signature.replace(parameters=[*others, *options])  # Typer reads it
        return run

    return decorate


def _option(field: dataclasses.Field[Any], kind: Any, default: Any) -> inspect.Parameter:
    names = [f"--{field.metadata['option']}"] if "option" in field.metadata else []
    if get_origin(kind) is tuple:
        kind, default = str, ",".join(map(str, default))
    annotation = Annotated[kind, typer.Option(*names, help=field.metadata["help"])]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(value: Any, kind: Any) -> Any:
    """Convert what the user wrote to the field's type `kind`. Typer has converted everything but tuples."""
    if get_origin(kind) is not tuple:
        return value
    element = get_args(kind)[0]
    try:
        return tuple(element(word) for word in words(value))
    except ValueError:
        raise ConfigError(f"'{value}' is not a list of {element.__name__} values such as 1,2,4") from None


def words(text: str) -> list[str]:
    """The parts of a comma-separated list, without spaces and empty parts."""
    return [word.strip() for word in text.split(",") if word.strip()]
