"""The `nightshift` command: `nightshift embed …`, `… classify …`, `… estimate …`, `… verify OUTPUT`,
`… submit JOB -- …`."""

import sys
from importlib import import_module

COMMANDS = ("embed", "classify", "estimate", "verify", "submit")


def main() -> int:
    """Run the job that the first argument names; return its exit code."""
    command, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command not in COMMANDS:
        print(f"usage: nightshift {{{','.join(COMMANDS)}}} …   (nightshift {COMMANDS[0]} --help)", file=sys.stderr)
        return 0 if command in ("-h", "--help") else 2
    sys.argv[0] = f"nightshift {command}"
    return int(import_module(f"jobs.{command}").main(arguments))


if __name__ == "__main__":
    sys.exit(main())
