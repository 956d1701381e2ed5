"""Find groups of images that are nearly the same, and which one of each group to keep.

    python jobs/duplicates.py OUTPUT --to duplicates.parquet
    python jobs/duplicates.py OUTPUT --to duplicates.parquet --threshold 0.95 --keep largest
    python jobs/duplicates.py OUTPUT --to duplicates.parquet --hash

OUTPUT is the output of a job that wrote embeddings of trained weights, or with --hash that of a job with --phash. The
file has the columns group, image_id, keep and similarity, for `search --exclude` and `fit --exclude`. Up to 100,000
rows all pairs are compared, beyond that those in overlapping partitions, on the cluster of RAY_ADDRESS if it is set.
After `--update` only new images are compared. Needs the extra [search].
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import cli
from pipeline.errors import SettingRefused, printable
from pipeline.explore.target import check_target, replaced
from pipeline.report.steps import OnStep, steps

if TYPE_CHECKING:
    from pipeline.explore.groups import Duplicates


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
        metavar="F",
        help="without --threshold: other images that an image may be joined with by chance (default: 0.001)",
    )
    duplicates_parser.add_argument(
        "--keep", default="first", metavar="first|largest|column:NAME", help="image of a group to keep (default: first)"
    )
    duplicates_parser.add_argument(
        "--hash", action="store_true", help="by the perceptual hashes of --phash, for exact copies and re-encodings"
    )
    duplicates_parser.add_argument(
        "--distance", type=int, metavar="BITS", help="with --hash: most different bits of 64 (default: 4)"
    )
    duplicates_parser.add_argument(
        "--anew", action="store_true", help="compare all images, also those that an earlier call compared"
    )
    duplicates_parser.add_argument("--quiet", action="store_true", help="show no progress")
    duplicates_parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return duplicates_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)

    def work() -> int:
        import pyarrow.parquet as pq

        check_target(flags.to, "--to", (".parquet",), flags.overwrite)
        with steps(quiet=flags.quiet) as on_step:
            result = _by_hash(flags, on_step) if flags.hash else _by_vectors(flags, on_step)
        with replaced(flags.to) as folder:
            pq.write_table(result.table, folder / flags.to.name)
        for line in (*result.describe().splitlines(), f"wrote {flags.to}"):
            print(printable(line))
        return 0

    return cli.guarded(work)


def _by_vectors(flags: argparse.Namespace, on_step: OnStep) -> "Duplicates":
    from pipeline.explore.choices import need_search
    from pipeline.explore.duplicates import FALSE_RATE, duplicates
    from pipeline.explore.pairs import here
    from pipeline.explore.table import open_output

    if flags.distance is not None:
        raise SettingRefused("--distance needs --hash; vectors are compared by --threshold")
    need_search("nightshift duplicates", "scipy")
    run_all = here
    if "RAY_ADDRESS" in os.environ:
        from pipeline.engine.tasks import run_all
    return duplicates(
        open_output(flags.output),
        threshold=flags.threshold,
        keep=flags.keep,
        false_rate=FALSE_RATE if flags.false_rate is None else flags.false_rate,
        anew=flags.anew,
        run_all=run_all,
        on_step=on_step,
    )


def _by_hash(flags: argparse.Namespace, on_step: OnStep) -> "Duplicates":
    from pipeline.explore.hashes import DISTANCE, duplicates_by_hash
    from pipeline.explore.table import open_output

    given = [name for name in ("threshold", "false_rate") if getattr(flags, name) is not None]
    if given or flags.anew:
        name = cli.flag_name(given[0]) if given else "--anew"
        raise SettingRefused(f"{name} is for vectors: with --hash use --distance, or leave out --hash")
    distance = DISTANCE if flags.distance is None else flags.distance
    return duplicates_by_hash(open_output(flags.output), distance=distance, keep=flags.keep, on_step=on_step)


if __name__ == "__main__":
    cli.leave(main())
