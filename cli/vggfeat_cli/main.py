"""`vggfeat`: its subcommands."""

from __future__ import annotations

from os.path import isfile
from pathlib import Path

import click

import vggfeat
from vggfeat_cli import analyse, learn, pictures
from vggfeat_cli.run import FAILED, finish


@click.group(
    "vggfeat", no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.version_option(vggfeat.__version__)
def command() -> None:
    """Study VGG, train it, and manage its weights."""


for module in (analyse, pictures, learn):
    for each in module.COMMANDS:
        command.add_command(each)


@command.group(no_args_is_help=False)
def weights() -> None:
    """List, fetch and verify the published weight sets."""


@weights.command("list")
def list_sets() -> None:
    """Show every published file.

    With its licence, and its path on this machine.
    """
    from vggfeat.weights import BUNDLED, SETS, folders

    for name, group in SETS.items():
        for arch, published in group.items():
            here = next((path for folder in folders() if isfile(path := folder / published.filename)), None)
            click.echo(f"{name:9} {arch:9} {published.filename:24} {here or '-'}  [{published.licence}]")
    click.echo(f"bundled   vgg19     {BUNDLED.name:24} {BUNDLED}  [CC BY 4.0, see the card beside it]")
    click.echo("random    any       made on the spot, seeded and calibrated")


@weights.command()
@click.argument("name")
@click.argument("arch", default="vgg16")
def fetch(name: str, arch: str) -> None:
    """Fetch a set for an architecture and verify it.

    NAME is imagenet or caffe; ARCH is vgg16 by default, while vggstyle and vggfeat invert use vgg19. Files already here
    are not fetched again.
    """
    from vggfeat.weights import find

    click.echo(str(find(name, arch)))


@weights.command()
@click.argument("files", nargs=-1, type=click.Path())
def verify(files: tuple[str, ...]) -> int:
    """Check files against their sha256.

    FILES, or every published file on this machine, against the published and recorded sha256.
    """
    from vggfeat.weights import folders, published_files, recorded, verify as check

    known = {name: published.digest for name, published in published_files().items()}
    paths = [Path(file) for file in files] or [
        path for folder in folders() for name in known if isfile(path := folder / name)
    ]
    if not paths:
        click.echo("no published weight file on this machine")
    if missing := [path for path in paths if not isfile(path)]:
        raise vggfeat.InputError(f"no file at {missing[0]}")
    bad = 0
    for path in paths:
        try:
            digest = check(path, known.get(path.name, ""), record=path.name in known)
            unknown = path.name not in known and not recorded(path)
            click.echo(f"{digest}  {path}{'  (nothing is published or recorded to compare it with)' * unknown}")
        except vggfeat.WeightsError as error:
            bad += 1
            click.echo(f"vggfeat: {error}", err=True)
    return FAILED if bad else 0


def main() -> None:
    """Entry point."""
    finish(command)
