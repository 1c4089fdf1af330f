"""Flags that several commands have, flags made from a settings dataclass, and the kinds of value they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from vggfeat.settings import kinds

device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
json_option = click.option("--json", "as_json", is_flag=True, help="Print a machine-readable summary.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress bar.")


class Values(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer releases of click
    """Comma-separated values."""

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


def settings(config: Any, *, defaults: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A flag for every field of a class of `Settings`; without `defaults`, those not given are None."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(dataclasses.fields(config)):
            held = kinds(config)[field.name]
            flag, yes_or_no = "--" + field.name.replace("_", "-"), held.item is bool
            if yes_or_no and not defaults:
                flag += f"/--no-{flag[2:]}"
            default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            kind: Any = Values(held.item) if held.many else held.item
            if field.name in config.CHOICES:
                kind = click.Choice(config.CHOICES[field.name])
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
