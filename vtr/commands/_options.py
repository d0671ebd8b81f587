"""Options that several commands share, said once: the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def shared(options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command: its first parameter takes an ``options``, whose fields typer sees behind its own.

    Args:
        options: a dataclass; each field is ``Annotated`` as an option and has a default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
        defaults.pop(next(iter(defaults)))  # takes the options
        types = {name: hints[name] for name in defaults} | get_type_hints(options, include_extras=True)
        fields = {field.name: field.default for field in dataclasses.fields(options)}

        def run(**kwargs: Any) -> None:
            given = options(**{name: kwargs.pop(name) for name in fields})
            command(given, **kwargs)

        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__annotations__ = {**types, "return": None}
        signed: Any = run
        signed.__signature__ = inspect.Signature(
            [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
                for name, default in (defaults | fields).items()
            ]
        )
        return run

    return decorate
