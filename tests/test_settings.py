"""vggfeat.settings: values in the types that a dataclass of settings declares, and what is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest

from vggfeat.errors import InputError
from vggfeat.settings import Settings, changed


@dataclass(frozen=True)
class Sample(Settings):
    path: str | None = None
    flag: bool = False
    count: int = 1
    rate: float = 0.5
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    weights: str | Mapping[str, Any] = "imagenet"


def test_values_take_the_type_of_their_field():
    """So that they can be compared, and stored as JSON, whatever they were given as."""
    given = Sample(Path("a/b"), True, numpy.int64(3), 2, ["x", Path("y")], [numpy.int32(4), 5], {"k": 1})
    expected = {"path": str(Path("a/b")), "flag": True, "count": 3, "rate": 2.0, "names": ["x", "y"], "sizes": [4, 5]}
    assert json.loads(json.dumps(given.to_dict())) == expected | {"weights": "a state dict"}
    assert type(given.rate) is float and given.names == ("x", "y")
    assert Sample(rate=numpy.float32(0.25)) == Sample(rate=0.25)
    assert json.dumps(Sample(rate=numpy.float32(0.25)).to_dict()["rate"]) == "0.25"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": True}, "count must be a whole number, got True"),
        ({"rate": False}, "rate must be a number, got False"),
        ({"path": True}, "path must be a string, got True"),
        ({"flag": 1}, "flag must be True or False, got 1"),
        ({"count": 2.0}, "count must be a whole number, got 2.0"),
        ({"count": None}, "count must be a whole number, got None"),
        ({"names": "abc"}, r"names must be a tuple, got 'abc': write \('abc',\)"),
        ({"sizes": (1, True)}, "sizes must be a whole number, got True"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_values_of_another_type_are_refused(wrong, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        Sample(**wrong)


def test_changed_names_what_is_not_free():
    before, now = {"a": 1, "b": 2}, {"a": 2, "b": 3, "c": 4}
    assert changed(before, now, ("a", "c")) == "b was 2, is 3"
    assert changed(before, now, ("b",)) == "a was 1, is 2, c was None, is 4"
    assert changed(before, before) == ""
