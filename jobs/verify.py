"""Prove from the files alone that an output is whole: every planned image exactly one row, of results or of _errors/.

    python jobs/verify.py OUTPUT
    python jobs/verify.py OUTPUT --repair

Ends with 0 if it is, with 5 and what is wrong if it is not. With --repair the parts that are not what they should be
are taken back, and the job's own command goes on from there; no job can work on the output meanwhile, and while one
does, this ends with 4.
"""

import argparse
import sys
from collections.abc import Sequence

from pipeline import cli
from pipeline.errors import NotWhole, printable
from pipeline.verify import repair, verify


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or s3://…")
    parser.add_argument("--repair", action="store_true", help="take back what is wrong, so that the same job goes on")
    given = parser.parse_args(arguments)

    def work() -> int:
        found = (repair if given.repair else verify)(given.output)
        print("\n".join(map(printable, found.lines())))
        if given.repair and not found.is_whole:
            for name in dict.fromkeys(commit.name for commit in found.bad_commits):
                print(printable(f"took back commit {name}"))
            print("run the job's command again: it removes what belongs to no commit, and computes what is missing")
        return 0 if found.is_whole else NotWhole.exit_code

    return cli.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
