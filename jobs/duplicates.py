"""Find groups of images that are nearly the same, and which one of each group to keep.

    python jobs/duplicates.py OUTPUT --to duplicates.parquet
    python jobs/duplicates.py OUTPUT --to duplicates.parquet --threshold 0.95 --keep largest

OUTPUT is the output of a job that wrote embeddings of trained weights. The file has the columns group, image_id, keep
and similarity, for `search --exclude` and `fit --exclude`. Up to 100,000 rows all pairs are compared, beyond that those
in overlapping partitions, on the cluster of RAY_ADDRESS if it is set. Needs the extra [search].
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline import cli
from pipeline.errors import printable
from pipeline.explore.target import check_target, replaced
from pipeline.report import messages


def parser() -> cli.Parser:
    duplicates_parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    duplicates_parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or in a bucket")
    duplicates_parser.add_argument("--to", type=Path, required=True, metavar="FILE.parquet", help="the file to write")
    duplicates_parser.add_argument(
        "--threshold", type=float, metavar="T", help="least cosine of duplicates (default: computed from the output)"
    )
    duplicates_parser.add_argument(
        "--false-rate",
        type=float,
        default=0.001,
        metavar="F",
        help="without --threshold: other images that an image may be joined with by chance (default: 0.001)",
    )
    duplicates_parser.add_argument(
        "--keep", default="first", metavar="first|largest|column:NAME", help="image of a group to keep (default: first)"
    )
    duplicates_parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return duplicates_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)

    def work() -> int:
        import pyarrow.parquet as pq

        from pipeline.explore.choices import need_search
        from pipeline.explore.duplicates import duplicates
        from pipeline.explore.pairs import here
        from pipeline.explore.table import open_output

        check_target(flags.to, "--to", (".parquet",), flags.overwrite)
        need_search("nightshift duplicates", "scipy")
        run_all = here
        if "RAY_ADDRESS" in os.environ:
            from pipeline.engine.tasks import run_all
        result = duplicates(
            open_output(flags.output),
            threshold=flags.threshold,
            keep=flags.keep,
            false_rate=flags.false_rate,
            run_all=run_all,
            on_cell=_show_cell,
        )
        with replaced(flags.to) as folder:
            pq.write_table(result.table, folder / flags.to.name)
        for line in (*result.describe().splitlines(), f"wrote {flags.to}"):
            print(printable(line))
        return 0

    return cli.guarded(work)


def _show_cell(done: int, cells: int) -> None:
    """Show about ten times how far the search is."""
    if done * 10 // cells > (done - 1) * 10 // cells:
        messages.say(f"compared {done:,} of {cells:,} partitions")


if __name__ == "__main__":
    cli.leave(main())
