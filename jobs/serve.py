"""Look at an output in a web browser: a local page with its pictures, labels, neighbours, clusters and errors.

    python jobs/serve.py OUTPUT
    python jobs/serve.py OUTPUT --port 9000 --column cls

The page shows the images in a grid. It filters them by label, score and text, finds the images that are similar to one
of them or to a picture of yours, and draws the vectors and the footprints. Marks become a CSV file of labels for
`nightshift fit`. Only this machine can open the page, and it loads nothing from the internet. Ctrl-C ends the server.
"""

import argparse
import signal
from collections.abc import Sequence

from pipeline import cli
from pipeline.errors import SettingRefused, printable
from pipeline.explore.serve.server import DEFAULT_PORT, Server, make_server
from pipeline.explore.serve.site import Site

MAX_PORT = 65535


def parser() -> cli.Parser:
    serve_parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    serve_parser.add_argument("output", metavar="OUTPUT", help="output directory of a job, local or in a bucket")
    serve_parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, metavar="N", help=f"0: any free port (default: {DEFAULT_PORT})"
    )
    serve_parser.add_argument(
        "--column", metavar="COL", help="column to filter and to colour by (default: label, if there is one)"
    )
    return serve_parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)

    def work() -> int:
        if not 0 <= flags.port <= MAX_PORT:
            raise SettingRefused(f"--port is {flags.port}: it must be a number from 0 to {MAX_PORT}")
        site = Site(flags.output, flags.column)
        with make_server(site, flags.port, cli.log) as server:
            print(printable(site.output.describe()))
            print(f"open {server.url} in a browser; Ctrl-C ends the server", flush=True)
            serve(server)
        return 0

    return cli.guarded(work)


def serve(server: Server) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores SIGINT otherwise
        signal.signal(number, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    cli.leave(main())
