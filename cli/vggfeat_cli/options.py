"""Flags made from a dataclass of settings, and the kinds of value that they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click


class Values(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer releases of click
    """Values between commas."""

    def __init__(self, item: type) -> None:
        self.item = item
        self.name = "names" if item is str else "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(self.item(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"expected numbers between commas, got {value!r}", param, ctx)


_TYPES: dict[str, Any] = {kind.__name__: kind for kind in (int, float, str)}
_TYPES |= {f"{kind.__name__} | None": kind for kind in (int, float, str)}
_TYPES |= {f"tuple[{kind.__name__}, ...]{none}": Values(kind) for kind in (int, float, str) for none in ("", " | None")}


def settings(
    config: type, choices: Mapping[str, Sequence[str]], *, defaults: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A flag for every field of a dataclass; without `defaults`, only those that are given have a value."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(dataclasses.fields(config)):
            flag, yes_or_no = "--" + field.name.replace("_", "-"), field.type == "bool"
            if yes_or_no and not defaults:
                flag += f"/--no-{flag[2:]}"
            default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            kind = click.Choice(choices[field.name]) if field.name in choices else _TYPES.get(str(field.type))
            command = click.option(
                flag,
                field.name,
                type=None if yes_or_no else kind,
                is_flag=yes_or_no,
                default=default if defaults else None,
                show_default=defaults and default is not None and default is not False,
                help=field.metadata["help"],
            )(command)
        return command

    return decorate
