"""Prove from the files alone that an output is whole: every planned image exactly one row, of results or of _errors/.

    python jobs/verify.py OUTPUT

Ends with 0 if it is, with 5 and what is wrong if it is not.
"""

import argparse
import sys
from collections.abc import Sequence

from pipeline import cli
from pipeline.errors import NotWhole
from pipeline.verify import verify


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or s3://…")
    output = parser.parse_args(arguments).output

    def work() -> int:
        found = verify(output)
        print("\n".join(found.lines()))
        return 0 if found.is_whole else NotWhole.exit_code

    return cli.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
