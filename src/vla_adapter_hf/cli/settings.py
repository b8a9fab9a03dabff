"""Options of a command from the fields of a settings dataclass, where names, types, defaults and help texts stand."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer


class Text(NamedTuple):
    """An option whose text stands for another value."""

    parse: Callable[[Any], Any]
    """From the option's value to the field's. Not called for None."""
    default: Any = None
    kind: Any = str | None


def takes_settings(
    settings_class: type,
    without: Collection[str] = (),
    texts: Mapping[str, Text] | None = None,
    names: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the parameter `settings` of a command becomes an option for each field of a settings dataclass.

    Args:
        settings_class: a dataclass whose docstring has an `Args:` section. Its text for a field is the option's help.
        without: fields that are no options.
        texts: fields whose option holds something else than the field, such as `0,2,5-7` for numbers.
        names: options that are not called like their field, such as `--compile` for `compiled`.
    """
    texts, names = texts or {}, names or {}
    helps, hints = help_texts(settings_class), get_type_hints(settings_class)
    chosen = [field for field in dataclasses.fields(settings_class) if field.name not in without]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.name != "settings":
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            for field in chosen:
                text = texts.get(field.name, Text(None, _default(field), hints[field.name]))
                option = typer.Option(*filter(None, [names.get(field.name)]), help=helps[field.name])
                parameters.append(
                    inspect.Parameter(
                        field.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=text.default,
                        annotation=Annotated[text.kind, option],
                    )
                )

        @wraps(function)
        def command(**values: Any) -> Any:
            given = {field.name: values.pop(field.name) for field in chosen}
            for name, text in texts.items():
                if given.get(name) is not None:
                    given[name] = text.parse(given[name])
            return function(**values, settings=settings_class(**given))

        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def help_texts(settings_class: type) -> dict[str, str]:
    """By field, the text under `Args:` of the class's docstring, or of the class that it extends."""
    texts: dict[str, str] = {}
    for base in reversed(settings_class.__mro__):
        section = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", inspect.cleandoc(base.__doc__ or ""), re.DOTALL)
        # An entry begins with four spaces, the lines after its first with eight.
        for entry in re.split(r"\n(?=    \S)", section[1] if section else ""):
            names, _, text = " ".join(entry.split()).partition(": ")
            names = re.sub(r"\s*\(.*?\)", "", names)
            text = text[:1].upper() + text[1:]  # a value in backticks or quotes stays as it is
            text = re.sub(r"\[?`+~?(?:[\w.]*\.)?([^`]*)`+\]?", r"\1", text)
            texts |= dict.fromkeys((name.strip() for name in names.split(",")), text)
    return texts


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
