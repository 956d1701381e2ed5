"""Which of these requirements does this Python not meet? Run on the cluster, as a job of its own.

    python jobs/submission/probe.py REQUIREMENT …

Its last line is a JSON list of them.
"""

import json
import sys
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement


def is_met(requirement: Requirement) -> bool:
    if requirement.marker and not requirement.marker.evaluate():
        return True
    if requirement.name == "python":
        return requirement.specifier.contains("{}.{}.{}".format(*sys.version_info))
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    print(json.dumps([text for text in sys.argv[1:] if not is_met(Requirement(text))]))
