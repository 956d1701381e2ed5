"""Write the rows of an output as a file for a GIS, for the web, or for programs that cannot read vectors in Parquet.

    python jobs/export.py OUTPUT --to windows.fgb
    python jobs/export.py OUTPUT --to windows.parquet
    python jobs/export.py OUTPUT --to vectors.npy
    python jobs/export.py OUTPUT --to small.parquet --pca 64

OUTPUT is the output of a job. The suffix chooses the format. Of vectors: .npy, .faiss, .lance, .webdataset, .csv and
.parquet. Of an output with footprints (--tile-size): .geojson, .fgb (FlatGeobuf), .gpkg (GeoPackage), .parquet
(GeoParquet) or .pmtiles (vector tiles), which need the extra [geo].
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import cli
from pipeline.errors import printable
from pipeline.explore.export import PARTITIONS, SORTS, export
from pipeline.output.geoparquet import VERSIONS


def parser() -> cli.Parser:
    export_parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    export_parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or in a bucket")
    export_parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="the file to write")
    export_parser.add_argument(
        "--columns",
        metavar="a,b,c",
        help="columns beside geometry or vectors (default: all without vectors; few in .pmtiles, .npy and .faiss)",
    )
    export_parser.add_argument("--vectors", action="store_true", help="write vectors to .csv and .parquet too")
    export_parser.add_argument(
        "--pca", type=int, metavar="N", help="reduce vectors to N principal components, and write these beside the file"
    )
    export_parser.add_argument("--where", metavar="SQL", help="only rows for which it is true: \"label = 'forest'\"")
    export_parser.add_argument("--bbox", metavar="W,S,E,N", help="only rows with a footprint in a box in degrees")
    export_parser.add_argument(
        "--exclude", metavar="FILE.parquet", help="without the duplicates that a file of `duplicates` does not keep"
    )
    export_parser.add_argument("--sort", choices=SORTS, help="order of the rows in GeoParquet (default: hilbert)")
    export_parser.add_argument(
        "--partition-by", choices=PARTITIONS, help="make GeoParquet a folder: by degree cell, zoom or month"
    )
    export_parser.add_argument(
        "--geoparquet", choices=VERSIONS, help="version of GeoParquet: 1.1 (default), or 2.0 with the type GEOMETRY"
    )
    export_parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return export_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(cli.joined(sys.argv[1:] if arguments is None else arguments))

    def work() -> int:
        columns = [name.strip() for name in flags.columns.split(",")] if flags.columns else []
        names = ("geoparquet", "vectors", "pca", "where", "bbox", "exclude", "overwrite")
        how = {name: getattr(flags, name) for name in names}
        result = export(flags.output, flags.to, columns, flags.sort, flags.partition_by, **how)
        print(printable(result.describe()))
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
