"""Print the requirements that this Python does not meet. jobs/submit.py runs it as a job on the cluster.

    python jobs/submission/probe.py REQUIREMENT …

The last line of its output is a JSON list of these requirements.
"""

import json
import sys
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement


def is_met(requirement: Requirement) -> bool:
    """True if an installed package, or this Python, has a version that the requirement accepts."""
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
