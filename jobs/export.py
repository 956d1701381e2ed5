"""Write the results of a job with their footprints as a file for a GIS or for the web.

    python jobs/export.py OUTPUT --to windows.fgb
    python jobs/export.py OUTPUT --to windows.parquet
    python jobs/export.py OUTPUT --to windows.pmtiles

OUTPUT is the output of a job over raster scenes (--tile-size). The suffix chooses the format: .geojson, .fgb
(FlatGeobuf), .gpkg (GeoPackage), .parquet (GeoParquet) or .pmtiles (vector tiles). Needs the extra [geo].
"""

import argparse
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
        "--columns", metavar="a,b,c", help="columns beside geometry (default: all without vectors; few in .pmtiles)"
    )
    export_parser.add_argument("--sort", choices=SORTS, help="order of the rows in .parquet (default: hilbert)")
    export_parser.add_argument(
        "--partition-by", choices=PARTITIONS, help="make .parquet a folder: by degree cell, zoom or month"
    )
    export_parser.add_argument(
        "--geoparquet", choices=VERSIONS, help="version of .parquet: 1.1 (default), or 2.0 with the type GEOMETRY"
    )
    export_parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return export_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)

    def work() -> int:
        columns = [name.strip() for name in flags.columns.split(",")] if flags.columns else []
        how = {"geoparquet": flags.geoparquet, "overwrite": flags.overwrite}
        result = export(flags.output, flags.to, columns, flags.sort, flags.partition_by, **how)
        print(printable(result.describe()))
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
