"""Run a network over an image archive of any size, and write the results as Parquet."""

import argparse
import os
import sys
from importlib import import_module

from pipeline import cli
from pipeline.version import __version__

COMMANDS = {
    "embed": "one vector per image",
    "classify": "label, score and top classes per image",
    "fit": "your own classes, from embeddings and some labels",
    "compare": "networks on a labelled sample: accuracy, speed and cost",
    "explain": "where in a picture a network finds its evidence for a class",
    "finetune": "your own classes, from labelled images, in all layers",
    "search": "the images most similar to an image, an id or a vector",
    "serve": "a local web page of an output: look, filter, search, mark",
    "index": "an approximate index, for faster searches",
    "duplicates": "groups of near-duplicates, and which image of each to keep",
    "analyze": "clusters, outliers, doubtful labels, and what has changed",
    "estimate": "hours, dollars and bottleneck of a run, before it starts",
    "verify": "proof from the files that no image is missing",
    "map": "the results of a scene as a GeoTIFF and a picture",
    "export": "footprints and results for a GIS or the web",
    "submit": "run a job on a Ray cluster and follow it to its end",
}
FOOTER = """\
start:     nightshift embed --input photos/ --output embeddings/ --model resnet50
continue:  the same command again, after any stop
flags:     nightshift COMMAND --help
complete:  eval "$(register-python-argcomplete nightshift)"   in bash or zsh
"""


class OverviewFormatter(argparse.RawDescriptionHelpFormatter):
    """One line per command, with room for the longest name of one."""

    def __init__(self, prog: str) -> None:
        longest = max(map(len, COMMANDS))
        super().__init__(prog, max_help_position=longest + 6)
        self._action_max_length = longest + 4  # argparse forgets that commands are indented twice


def main() -> int:
    """Run the job that the first argument names, and exit with its exit code."""
    complete()
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command not in COMMANDS:
        parser().parse_args([command])  # prints help, the version or an error, and exits
    sys.argv[0] = f"nightshift {command}"
    cli.leave(int(import_module(f"jobs.{command}").main(arguments)))


def parser() -> cli.Parser:
    """The overview: one line per command. The flags of a command are in its own parser."""
    overview = cli.Parser(prog="nightshift", description=__doc__, epilog=FOOTER, formatter_class=OverviewFormatter)
    overview.add_argument("--version", action="version", version=f"nightshift {__version__}")
    commands = overview.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return overview


def complete() -> None:
    """Answer a shell that asks for completions, and exit. Otherwise do nothing."""
    words = os.environ.get("COMP_LINE", "").split()
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    completed = cli.Parser(prog="nightshift")
    completed.add_argument("--version", action="store_true")
    commands = completed.add_subparsers()
    for name in COMMANDS:
        parents = [import_module(f"jobs.{name}").parser()] if words[1:2] == [name] else []
        commands.add_parser(name, parents=parents, add_help=not parents)
    argcomplete.autocomplete(completed)


if __name__ == "__main__":
    sys.exit(main())
