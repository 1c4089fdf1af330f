"""The command line of exercises 2, 8 and 9: the keywords of `main` are the options, bad input is one line."""

import argparse
import inspect
import sys

from vggfeat.errors import InputError, VGGFeatError
from vggfeat.plots import check_plot


def command(main, doc):
    """Call `main` as the command line says, its keywords being the options; bad input is one line and exit status 2."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message} (see --help)")

    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, each in inspect.signature(main).parameters.items():
        if each.kind is each.VAR_POSITIONAL:
            parser.add_argument(name, nargs="*", default=())
        else:
            kind = str if each.default is None else type(each.default)
            parser.add_argument(f"--{name}", type=kind, default=each.default, help=f"default: {each.default}")
    try:
        options = vars(parser.parse_args())
        if options.get("plot"):
            check_plot(options["plot"], overwrite=True)
        main(*options.pop("zips", ()), **options)
    except VGGFeatError as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
