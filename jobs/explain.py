"""Explain why images of an output have their class: where in the picture the network found its evidence, as PNG.

    python jobs/explain.py labels/ --id cat.jpg --id photos/dog.jpg --to why/
    python jobs/explain.py labels/ --id cat.jpg --label dog --to why/
    python jobs/explain.py labels/ --id cat.jpg --head animals.safetensors --to why/

OUTPUT is the output of classify, or of embed with --label or --head. The image is read again from its archive, and the
network computes in this process. The picture shows the pixels that the network saw, and Grad-CAM over them. Needs
`pip install "nightshift[explain]"`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline import cli
from pipeline.errors import printable
from pipeline.explain.job import explain


def parser() -> cli.Parser:
    explain_parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    explain_parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or in a bucket")
    explain_parser.add_argument(
        "--id",
        action="append",
        default=[],
        metavar="IMAGE_ID",
        help="image_id, or the end of it such as the file's name",
    )
    explain_parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder of the pictures")
    explain_parser.add_argument(
        "--label", metavar="NAME", help="class to explain, by name or number (default: that of the row)"
    )
    explain_parser.add_argument("--head", metavar="FILE", help="head that gave the classes, made by fit")
    explain_parser.add_argument("--weights", metavar="FILE", help="the run's weights, if the file was moved")
    explain_parser.add_argument("--overwrite", action="store_true", help="replace pictures that exist")
    return explain_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)

    def work() -> int:
        options = {name: getattr(flags, name) for name in ("label", "head", "weights", "overwrite")}
        for each in explain(flags.output, flags.id, flags.to, **options):
            print(printable(each.describe()))
            print(printable(f"wrote {each.file}"))
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
