"""What the dataclasses of settings are made of: fields with a help text, values in the type they are declared with."""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

from vggfeat.errors import InputError

__all__ = ["StateDict", "changed", "option", "plain", "typed"]


STATE = " | Mapping[str, Any]"  # of a type, that a state dict will do as well


def option(default: Any, help: str) -> Any:
    """A field with a default, and the text that the commands show for its flag."""
    return dataclasses.field(default=default, metadata={"help": help})


class StateDict(Mapping[str, Any]):
    """A state dict among settings: the same as itself alone, as tensors are not compared, and shown in few words."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state

    def __getitem__(self, key: str) -> Any:
        return self.state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StateDict) and self.state is other.state

    def __hash__(self) -> int:
        return id(self.state)

    def __repr__(self) -> str:
        return "a state dict"


def typed(name: str, kind: str, value: Any) -> Any:
    """A field's value in the type it is declared with: a path becomes text, a whole number a float where one is due."""
    if value is None and kind.endswith(" | None"):
        return None
    kind = kind.removesuffix(" | None")
    if takes_state := kind.endswith(STATE):
        kind = kind.removesuffix(STATE)
        if isinstance(value, Mapping):
            return value if isinstance(value, StateDict) else StateDict(value)
    if kind.startswith("tuple["):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise InputError(f"{name} must be a tuple, got {value!r}: write ({value!r},)")
        return tuple(typed(name, kind[len("tuple[") : -len(", ...]")], item) for item in value)
    if kind == "str" and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind == "float" and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    expected = {"str": "a text", "bool": "True or False", "int": "a whole number", "float": "a number"}[kind]
    expected += " or a state dict" * takes_state
    raise InputError(f"{name} must be {expected}, got {reprlib.repr(value)}")


def plain(config: Any) -> dict[str, Any]:
    """A dataclass of settings as plain values, for JSON; a state dict becomes the words that it is one."""
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    return {name: repr(value) if isinstance(value, StateDict) else value for name, value in values.items()}


def changed(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """In words, which settings differ from those that a run was begun with, but for `free` ones; empty if none does."""
    odd = [name for name, value in now.items() if name not in free and before.get(name) != value]
    return ", ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in odd)
