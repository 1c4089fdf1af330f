"""How a command shows a report: as text, Markdown, JSON or CSV, on the terminal or in a file, and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from vggfeat.errors import InputError

if TYPE_CHECKING:
    from vggfeat.tables import Report

FORMATS = {"text": "__str__", "markdown": "to_markdown", "json": "to_json", "csv": "to_csv"}

output_option = click.option("-o", "--output", type=click.Path(), help="Write to this file, not to the terminal.")
format_option = click.option(
    "--format",
    "form",
    type=click.Choice([*FORMATS]),
    default="text",
    show_default=True,
    help="Format of the report; CSV holds only its first table.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace existing files.")
plot_option = click.option("--plot", type=click.Path(), help="Also draw it: PNG, PDF or SVG.")


def finish_report(report: Report, form: str, output: str | None, overwrite: bool) -> None:
    text = getattr(report, FORMATS[form])()
    if output is None:
        click.echo(text.rstrip("\n"))
        return
    from vggfeat.files import check_path, written

    with written(check_path(output, overwrite=overwrite), overwrite=overwrite) as file:
        file.write((text.rstrip("\n") + "\n").encode())
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
