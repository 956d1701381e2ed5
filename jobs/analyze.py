"""Show what is in an output: clusters, outliers, doubtful labels, classes, quality; and what has changed.

    python jobs/analyze.py OUTPUT --to analysis/
    python jobs/analyze.py OUTPUT --against EARLIER_OUTPUT --to analysis/
    python jobs/analyze.py OUTPUT --method hdbscan --json

OUTPUT is the output of a job, finished or not. An output without vectors gives its classes, scores and quality. The
folder gets images.parquet (a row per image), clusters.parquet, classes.parquet, changes.parquet and analysis.json.
Needs the extra [search] for vectors.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline import cli
from pipeline.errors import printable
from pipeline.explore.clusters import HDBSCAN_SAMPLE, METHODS
from pipeline.explore.outliers import NEIGHBOURS
from pipeline.report.steps import steps


def parser() -> cli.Parser:
    analyze_parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    analyze_parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or in a bucket")
    analyze_parser.add_argument("--against", metavar="OUTPUT", help="an earlier output: show what has changed since")
    analyze_parser.add_argument("--to", type=Path, metavar="FOLDER", help="write the results as Parquet files")
    analyze_parser.add_argument(
        "--method", default="kmeans", metavar="|".join(METHODS), help="how to cluster (default: kmeans)"
    )
    analyze_parser.add_argument(
        "--clusters", type=int, metavar="N", help="clusters of k-means (default: grows with the output, up to 100)"
    )
    analyze_parser.add_argument(
        "--sample", type=int, metavar="N", help=f"images that HDBSCAN clusters (default: {HDBSCAN_SAMPLE})"
    )
    analyze_parser.add_argument(
        "--neighbours",
        type=int,
        default=NEIGHBOURS,
        metavar="K",
        help=f"neighbours whose distance and labels count (default: {NEIGHBOURS})",
    )
    analyze_parser.add_argument(
        "--label", metavar="COLUMN", help="column of classes, such as a kept one (default: that of `classify`)"
    )
    analyze_parser.add_argument("--json", action="store_true", help="print everything as JSON")
    analyze_parser.add_argument("--overwrite", action="store_true", help="replace an earlier analysis in the folder")
    return analyze_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)

    def work() -> int:
        from pipeline.explore.analysis import analyze
        from pipeline.explore.analysis_tables import show
        from pipeline.explore.table import open_output

        output = open_output(flags.output)
        against = open_output(flags.against) if flags.against is not None else None
        with steps(quiet=flags.json) as on_step:
            analysis = analyze(
                output,
                to=flags.to,
                against=against,
                clusters=flags.clusters,
                method=flags.method,
                sample=flags.sample,
                neighbours=flags.neighbours,
                label=flags.label,
                overwrite=flags.overwrite,
                on_step=on_step,
            )
        if flags.json:
            print(json.dumps(analysis.figures, indent=1))
            return 0
        show(analysis)
        if flags.to:
            print(printable(f"wrote {flags.to}"))
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
