"""The command line of the exercises: `main`'s keywords are the options, bad input gives one line."""

import argparse
import inspect
import os
import sys

from vggfeat.errors import InputError, VGGFeatError
from vggfeat.plots import check_plot
from vggfeat.visualize import check_sheet


def names(text):
    """Comma-separated names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def last_of_each_block(weights, kind):
    """The last `conv` or `relu` of each block, as far as the weights reach."""
    there = [layer.name for layer in weights.arch.convs if f"features.{layer.index}.weight" in weights.state]
    last = {name.partition("_")[0]: name for name in there}
    return tuple(name.replace("conv", kind) for name in last.values())


def command(main, doc):
    """Call `main` with its keywords as command-line options; bad input gives one line and exit status 2."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message} (see --help)")

    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, each in inspect.signature(main).parameters.items():
        if each.kind is each.VAR_POSITIONAL:
            parser.add_argument(name, nargs="*", default=())
        elif each.default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            kind = names if isinstance(each.default, tuple) else str if each.default is None else type(each.default)
            shown = ",".join(each.default) if kind is names else getattr(each.default, "name", each.default)
            told = f"default: {shown}" if shown else None
            parser.add_argument(f"--{name}", type=kind, default=each.default, help=told)
    try:
        options = vars(parser.parse_args())
        if options.get("plot"):
            check_plot(options["plot"], overwrite=True)
        if options.get("picture"):
            check_sheet(options["picture"], overwrite=True)
        main(*options.pop("zips", ()), **options)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`: nobody reads on, as in the commands no reason for a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the last flush would complain
        sys.exit(1)
    except VGGFeatError as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
