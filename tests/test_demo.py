"""The demo around its jobs: what it shows of an output without errors, and what Ctrl-C does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from jobs import demo

ROOT = Path(__file__).resolve().parents[1]
JOB = """
import signal, sys, time

def leave(*_):
    time.sleep(1)  # as long as a report takes
    print("reported", flush=True)
    sys.exit(130)

signal.signal(signal.SIGINT, leave)
print("working", flush=True)
time.sleep(60)
"""
DEMO = """
import sys
from pathlib import Path
from jobs import demo

demo.JOBS = Path(sys.argv.pop())
sys.exit(demo.main())
"""


def test_an_output_without_errors_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for output in ("embeddings", "labels"):
        (tmp_path / output).mkdir()
    ids = pd.DataFrame({"image_id": ["a/1.jpg", "a/2.jpg"]})
    vectors = ids.assign(embedding=[[0.0, 1.0, 2.0, 3.0]] * 2)
    vectors.to_parquet(tmp_path / "embeddings" / "part.parquet")
    labels = ids.assign(width=4, height=3, cls=None, label="cat", score=0.5)
    labels.to_parquet(tmp_path / "labels" / "part.parquet")
    demo.show(tmp_path)
    assert "one row each in _errors/:\nnone\n" in capsys.readouterr().out


def test_ctrl_c_waits_for_the_job_and_ends_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "make_demo_archive.py").write_text(JOB)
    command = [sys.executable, "-c", DEMO, str(tmp_path / "out"), str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while process.stdout.readline() != "working\n":
        assert process.poll() is None, process.stderr and process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the demo and to its job
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "reported\n")
    assert err.endswith("ended with 130\n")
    assert "Traceback" not in err
