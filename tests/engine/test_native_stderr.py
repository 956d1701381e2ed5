"""Standard error without one line of Ray's C++ code."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys
from pipeline.engine.native_stderr import filtered_native_stderr
kept = sys.stderr
with filtered_native_stderr():
    os.write(2, b"core_worker.cc:2465: Actor with class name: 'A' has constructor arguments in the object store\\n")
    os.write(2, b"another native line\\n")
    print("an old handle", file=kept, flush=True)
print("after", file=sys.stderr)
os.write(2, b"native after\\n")
"""


def test_only_the_line_about_actors_is_left_out() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["another native line", "an old handle", "after", "native after"]
