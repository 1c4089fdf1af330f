"""What the dataclasses of settings are made of: fields with a help text, values in the type they are declared with."""

from __future__ import annotations

import dataclasses
import functools
import os
import reprlib
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from vggfeat.errors import InputError, check_choice

PRECISIONS = ("auto", "float32", "bfloat16")
WORDS = {str: "a string", bool: "True or False", int: "a whole number", float: "a number"}


def option(default: Any, help: str) -> Any:
    """A field with a default, and the text that the commands show for its flag."""
    return dataclasses.field(default=default, metadata={"help": help})


class StateDict(Mapping[str, Any]):
    """A state dict as a setting: compared by identity, and shown in a few words."""

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


@dataclass(frozen=True)
class Kind:
    """The declared type of a field.

    Attributes:
        item: `str`, `bool`, `int` or `float`; of a tuple, what each of its values is.
        many: a tuple of them.
        optional: None will do as well.
        state: a state dict will do as well.
    """

    item: type
    many: bool
    optional: bool
    state: bool

    def value(self, name: str, given: Any) -> Any:
        """A value for the field of that name in its type: a path becomes text, a whole number a float."""
        if given is None and self.optional:
            return None
        if self.state and isinstance(given, Mapping):
            return given if isinstance(given, StateDict) else StateDict(given)
        if not self.many:
            return self._item(name, given)
        if isinstance(given, str) or not isinstance(given, Iterable):
            items = tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else (given,)
            raise InputError(f"{name} must be a tuple, got {given!r}: write {items!r}")
        if isinstance(given, Mapping):
            raise InputError(f"{name} must be a tuple, got {reprlib.repr(given)}: write the values alone, in order")
        return tuple(self._item(name, each) for each in given)

    def _item(self, name: str, given: Any) -> Any:
        if self.item is str and isinstance(given, str | os.PathLike):
            return os.fspath(given)
        if isinstance(given, bool):  # which is an Integral, too
            if self.item is bool:
                return given
        elif self.item is int and isinstance(given, Integral):
            return int(given)
        elif self.item is float and isinstance(given, Real):
            return float(given)
        expected = WORDS[self.item] + " or a state dict" * self.state
        raise InputError(f"{name} must be {expected}, got {reprlib.repr(given)}")


@functools.cache
def kinds(config: type) -> dict[str, Kind]:
    """What the fields of a dataclass of settings hold, by name."""
    hints = get_type_hints(config)
    return {each.name: _kind(hints[each.name]) for each in dataclasses.fields(config)}


def _kind(hint: Any) -> Kind:
    parts = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    (held,) = (part for part in parts if part is not types.NoneType and get_origin(part) is not Mapping)
    many = get_origin(held) is tuple
    state = any(get_origin(part) is Mapping for part in parts)
    return Kind(get_args(held)[0] if many else held, many, types.NoneType in parts, state)


@dataclass(frozen=True)
class Settings:
    """What frozen dataclasses of settings have in common.

    Attributes:
        CHOICES: by field, the words that it takes.

    Raises:
        InputError: a value that is not of the type that its field is declared with, or none of the words.
    """

    CHOICES: ClassVar[Mapping[str, Sequence[str]]] = {}

    def __post_init__(self) -> None:
        own: Any = type(self)
        for name, kind in kinds(own).items():
            object.__setattr__(self, name, kind.value(name, getattr(self, name)))
        for name, choices in self.CHOICES.items():
            check_choice(name, getattr(self, name), choices)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON; a state dict becomes the words that it is one."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {name: repr(value) if isinstance(value, StateDict) else value for name, value in values.items()}


def changed(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """In words, which settings other than `free` differ from those a run began with; empty if none does."""
    odd = [name for name, value in now.items() if name not in free and before.get(name) != value]
    return ", ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in odd)
