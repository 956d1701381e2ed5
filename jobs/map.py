"""Draw the results of a scene as a map: a cloud-optimized GeoTIFF on the scene's own grid, and a picture.

    python jobs/map.py OUTPUT --to map.tif
    python jobs/map.py OUTPUT --scene S2A_T32TMT.tif --to map.tif --png map.png
    python jobs/map.py OUTPUT --to map.tif --png map.png --colors colors.csv
    python jobs/map.py OUTPUT --to components.tif --show embedding

OUTPUT is the output of a job over raster scenes (--tile-size). The map has one pixel per step from window to window, in
the scene's CRS. Overlapping windows vote by their scores. Windows without a result have no data. Needs the extra [geo].
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline import cli
from pipeline.errors import printable
from pipeline.explore.colors import read_colors
from pipeline.explore.map import SHOWN, write_map


def parser() -> cli.Parser:
    map_parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    map_parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or in a bucket")
    map_parser.add_argument("--to", type=Path, metavar="MAP.tif", help="write a cloud-optimized GeoTIFF")
    map_parser.add_argument("--png", type=Path, metavar="FILE.png", help="write a picture of the map over the scene")
    map_parser.add_argument(
        "--scene", metavar="URI", help="the scene, or the end of its URI (default: the only one of the output)"
    )
    map_parser.add_argument(
        "--show",
        choices=SHOWN,
        default="class",
        help="class of each window, its score, or three principal components of its embedding (default: class)",
    )
    map_parser.add_argument(
        "--colors", metavar="FILE.csv", help="colours of the classes: columns label and color (#RRGGBB, or a CSS name)"
    )
    map_parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return map_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)

    def work() -> int:
        more = {"png": flags.png, "colors": read_colors(flags.colors) if flags.colors else None}
        result = write_map(flags.output, flags.to, flags.scene, flags.show, **more, overwrite=flags.overwrite)
        print(printable(result.describe()))
        for path in filter(None, (flags.to, flags.png)):
            print(printable(f"wrote {path}"))
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
