"""Find the images of an output that are most similar to an image, to one of its own images, or to a vector.

    python jobs/search.py OUTPUT --image photo.jpg
    python jobs/search.py OUTPUT --id cat.jpg -k 50 --where "label = 'forest' AND score > 0.5" --to hits.html
    python jobs/search.py OUTPUT --vector queries.npy --json

OUTPUT is the output of a job that wrote embeddings. An image is embedded by the network, weights and transform that the
output was made with. Similarity is the cosine of two vectors; the search is exact unless --index is given.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import cli
from pipeline.errors import printable
from pipeline.explore.search import COUNT, Hits, read_vectors, search
from pipeline.explore.table import Output, open_output
from pipeline.explore.target import check_target
from pipeline.report.steps import steps

PAGE, PARQUET = ".html", ".parquet"


def parser() -> cli.Parser:
    search_parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    search_parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or in a bucket")
    search_parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image to search for")
    search_parser.add_argument(
        "--id", action="append", default=[], metavar="IMAGE_ID", help="an image of the output, or the end of its name"
    )
    search_parser.add_argument(
        "--vector", action="append", default=[], metavar="FILE.npy", help="one vector, or one per row"
    )
    search_parser.add_argument(
        "-k", "--count", type=int, default=COUNT, metavar="N", help=f"hits of each query (default: {COUNT})"
    )
    search_parser.add_argument("--where", metavar="SQL", help="only rows for which it is true: \"label = 'forest'\"")
    search_parser.add_argument("--bbox", metavar="W,S,E,N", help="only rows with a footprint in a box in degrees")
    search_parser.add_argument(
        "--exclude", metavar="FILE.parquet", help="without the duplicates that a file of `duplicates` does not keep"
    )
    search_parser.add_argument("--index", action="store_true", help="use the index of `nightshift index`")
    search_parser.add_argument("--json", action="store_true", help="print a list of hits as JSON")
    search_parser.add_argument("--to", type=Path, metavar="FILE", help="write the hits, as .parquet or .html")
    search_parser.add_argument("--quiet", action="store_true", help="show no progress")
    search_parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return search_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(cli.joined(sys.argv[1:] if arguments is None else arguments))

    def work() -> int:
        if flags.to:
            check_target(flags.to, "--to", (PARQUET, PAGE), flags.overwrite)
        output = open_output(flags.output)
        with steps(quiet=flags.quiet or flags.json) as on_step:
            hits = search(
                output,
                images=flags.image,
                ids=flags.id,
                vectors=read_vectors(flags.vector),
                count=flags.count,
                where=flags.where,
                bbox=flags.bbox,
                exclude=flags.exclude,
                index=flags.index,
                on_step=on_step,
            )
        if flags.to:
            _write(output, hits, flags.to)
        if flags.json:
            print(json.dumps(hits.to_list(), indent=1, default=str))
        elif flags.to:
            print(printable(f"wrote {flags.to}: {len(hits.table):,} hits"))
        else:
            from pipeline.explore.search_page import show

            show(hits)
        return 0

    return cli.guarded(work)


def _write(output: Output, hits: Hits, to: Path) -> None:
    import pyarrow.parquet as pq

    from pipeline.explore.search_page import html
    from pipeline.explore.target import replaced

    with replaced(to) as folder:
        if to.suffix.lower() == PARQUET:
            pq.write_table(hits.table, folder / to.name)
        else:
            (folder / to.name).write_text(html(output, hits), encoding="utf-8")


if __name__ == "__main__":
    cli.leave(main())
