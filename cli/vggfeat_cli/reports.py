"""How a command shows a report: as text, Markdown, JSON or CSV, on the terminal or in a file, and as a plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vggfeat.errors import InputError, RunError

if TYPE_CHECKING:
    from vggfeat.tables import Report

SUFFIXES = {".md": "markdown", ".json": "json", ".csv": "csv"}
FORMATS = {"text": "__str__", "markdown": "to_markdown", "json": "to_json", "csv": "to_csv"}

output_option = click.option("-o", "--output", type=click.Path(), help="Write to this file, not to the terminal.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace existing files.")
plot_option = click.option("--plot", type=click.Path(), help="Also draw it: PNG, PDF or SVG.")


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--format`, and `--json` as other commands have it."""
    command = click.option("--json", "form", flag_value="json", help="The same as --format json.")(command)
    told = "Format of the report; CSV holds only its first table.  [default: by the output's suffix, or text]"
    return click.option("--format", "form", type=click.Choice([*FORMATS]), help=told)(command)


def finish_report(report: Report, form: str | None, output: str | None, overwrite: bool) -> None:
    form = form or SUFFIXES.get(Path(output or "").suffix.lower(), "text")
    text = getattr(report, FORMATS[form])().rstrip("\n")
    if output is None:
        if form == "json" and (sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8"):
            text = json.dumps(report.to_dict(), indent=2)  # with escapes: JSON is of UTF-8, whatever the terminal's
        click.echo(text)
        return
    from vggfeat.files import check_path, written

    try:
        with written(check_path(output, overwrite=overwrite), overwrite=overwrite) as file:
            file.write(f"{text}\n".encode(errors="replace"))  # names of files can be any bytes
    except (InputError, RunError):  # it may have taken an hour
        click.echo(text)
        raise
    click.echo(output)


def check_outputs(output: str | None, plot: str | None, overwrite: bool, inputs: Sequence[str] = ()) -> None:
    """Stop before any work if an output cannot be written, or would replace an input."""
    from vggfeat.files import check_path, same_file

    if output is not None and plot is not None and same_file(output, plot):
        raise InputError(f"--plot and --output are both {plot}: give them two names")
    if output is not None:
        check_path(output, overwrite=overwrite, inputs=inputs)
    if plot is not None:
        from vggfeat.plots import check_plot

        check_plot(plot, overwrite=overwrite, inputs=inputs)
