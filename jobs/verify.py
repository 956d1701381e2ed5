"""Prove from the files alone that an output is whole: every planned image is one row, of results or of _errors/.

    python jobs/verify.py OUTPUT
    python jobs/verify.py OUTPUT --repair

Ends with 0 if the output is whole. Otherwise prints the problems and ends with 5. --repair removes damaged parts; the
job's own command then computes them again. During a repair no job can start on the output; if a job is working on it,
the repair ends with 4.
"""

import argparse
from collections.abc import Sequence

from pipeline import cli
from pipeline.errors import NotWhole, printable
from pipeline.output.verify import repair, verify


def parser() -> cli.Parser:
    verify_parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verify_parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or in a bucket")
    verify_parser.add_argument(
        "--repair", action="store_true", help="remove damaged parts, so that the same job computes them again"
    )
    return verify_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)

    def work() -> int:
        result = (repair if flags.repair else verify)(flags.output)
        print("\n".join(map(printable, result.lines())))
        if flags.repair and not result.is_whole:
            for name in dict.fromkeys(commit.name for commit in result.bad_commits):
                print(printable(f"removed commit {name}"))
            print("run the job's command again: it removes parts without a commit and computes the missing rows")
        return 0 if result.is_whole else NotWhole.exit_code

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
