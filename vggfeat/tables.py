"""Tables as text, Markdown and CSV, and reports made of them."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def mega(value: float, digits: int = 2) -> str:
    """A count in millions (10⁶), or bytes in MB: `12.85`."""
    return f"{value / 1e6:,.{digits}f}"


def short(name: str, most: int = 20) -> str:
    """A file's or folder's name as a label: printable, on one line, and cut to `most` characters."""
    name = " ".join(name.encode(errors="replace").decode().split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: two for each of East Asia's wide characters."""
    return len(text) + sum(unicodedata.east_asian_width(each) in "WF" for each in text)


def apart(names: Sequence[str], most: int = 20) -> list[str]:
    """Names as distinct labels: those that would coincide keep their ends, or get numbers."""
    labels = [short(name, most) for name in names]
    ends = ["…" + short(name, len(name))[1 - most :] for name in names]
    for made in (ends, [f"{i}: {short(name, most - 4)}" for i, name in enumerate(names)]):
        times = Counter(labels)
        labels = [own if times[own] == 1 else new for own, new in zip(labels, made, strict=True)]
    return labels


@dataclass(frozen=True)
class Column:
    """A column: its key in CSV, its title for readers, and how a value is shown."""

    key: str
    title: str
    show: Callable[[Any], str] = str
    left: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of raw values under columns that know how to show them; None is shown as an en dash.

    >>> print(Table("Counts", [Column("n", "n"), Column("macs", "M", mega)], [(1, 2_500_000), (20, None)]).text())
    Counts
     n     M
     1  2.50
    20     –
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    def cells(self) -> list[list[str]]:
        """Every value as it is shown."""
        return [
            # names of folders can have several lines
            [
                "–" if v is None else " ".join(column.show(v).splitlines())
                for column, v in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]

    def text(self) -> str:
        """Aligned columns under the title."""
        lines = [[column.title for column in self.columns], *self.cells()]
        widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
        rows = (
            "  ".join(
                cell + " " * (width - _width(cell)) if column.left else " " * (width - _width(cell)) + cell
                for cell, width, column in zip(line, widths, self.columns, strict=True)
            ).rstrip()
            for line in lines
        )
        return "\n".join([self.title, *rows])

    def markdown(self) -> str:
        """A Markdown table under its title in bold."""
        head = [column.title for column in self.columns]
        rule = [":--" if column.left else "--:" for column in self.columns]
        cells = [[cell.replace("|", r"\|") for cell in row] for row in self.cells()]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in (head, rule, *cells))])

    def csv(self) -> str:
        """Comma-separated raw values under the columns' keys; None is empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(column.key for column in self.columns)
        writer.writerows(self.rows)
        return out.getvalue()


class Report:
    """Something that prints as tables; CSV holds the first."""

    def tables(self) -> list[Table]:
        """The tables, the main one first."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, texts, lists and dicts; counts in units, sizes in bytes, times in seconds."""
        raise NotImplementedError

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_markdown(self) -> str:
        """Every table as Markdown."""
        return "\n\n".join(table.markdown() for table in self.tables())

    def to_csv(self) -> str:
        """The main table as CSV, raw values."""
        return self.tables()[0].csv()

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables())

    __repr__ = __str__  # at a prompt too

    def _repr_markdown_(self) -> str:  # for notebooks
        return self.to_markdown()
