"""Keep an approximate index beside an output, for `search --index`.

    python jobs/index.py OUTPUT

It is written to OUTPUT/_index/. After `--update` run it again: it adds the new parts. Prints recall@10 against exact
search. Needs the extra [search].
"""

import argparse
from collections.abc import Sequence

from pipeline import cli
from pipeline.errors import printable
from pipeline.report.steps import steps


def parser() -> cli.Parser:
    index_parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    index_parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or in a bucket")
    index_parser.add_argument("--quiet", action="store_true", help="show no progress")
    index_parser.add_argument("--overwrite", action="store_true", help="build the index anew")
    return index_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)

    def work() -> int:
        from pipeline.explore.index import build
        from pipeline.explore.table import open_output

        with steps(quiet=flags.quiet) as on_step:
            record = build(open_output(flags.output), overwrite=flags.overwrite, on_step=on_step)
        print(printable(record.describe()))
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
