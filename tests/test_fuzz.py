"""Mutated images and archives, in processes of their own: no crash, no hang, no other exception, bounded memory.

A few seconds as a rule; `NIGHTSHIFT_FUZZ_SECONDS=600` runs as long as it says. A finding names the file that holds the
last input; `python tests/test_fuzz.py <target> --again FILE` gives it once more.
"""

import argparse
import faulthandler
import gzip
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
SECONDS = float(os.environ.get("NIGHTSHIFT_FUZZ_SECONDS", "6"))
MAX_SECONDS_EACH = 10
MAX_PIXELS = 4_000_000
MAX_ROWS = 5000
"""A mutated archive may say that it has any number of rows, and then it has; so many of them are read."""

MAX_GROWTH_MIB = {"images": 24 * MAX_PIXELS >> 20, "tar": 96, "zip": 96, "parquet": 96, "abort": 96}
"""Peak memory over that of the unmutated seeds: of images 24 bytes a pixel, of archives the readers' own buffers."""

KINDS = ("byte", "bit", "word", "cut", "delete", "repeat", "move", "insert")
WORDS = [
    word.to_bytes(4, order)
    for word in (0, 1, 0x7F, 0xFFFF, 1 << 31, 0x7FFFFFFF, 0xFFFFFFFF)
    for order in ("little", "big")
]
Change = tuple[str, float, int, int]
changes = st.lists(
    st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 2**16 - 1), st.integers(1, 64)),
    min_size=1,
    max_size=6,
)


def mutated(data: bytes, changed: Sequence[Change]) -> bytes:
    """Each change at a share of the length: an odd number lies rather in the header, seldom in a format's magic."""
    found = bytearray(data)
    for kind, share, number, length in changed:
        place = int((share**4 if number % 2 else share) * max(len(found) - 1, 0)) + (4 if number % 8 else 0)
        piece = bytes(found[place : place + length])
        if kind == "byte":
            found[place : place + 1] = bytes([number >> 8])
        elif kind == "bit" and piece:
            found[place] ^= 1 << length % 8
        elif kind == "word":
            found[place : place + 4] = WORDS[number % len(WORDS)]
        elif kind == "cut":
            del found[max(place, 1) :]
        elif kind == "delete":
            del found[place : place + length]
        elif kind == "repeat":
            found[place:place] = piece * (number % 50)
        elif kind == "move":
            target = number % (len(found) + 1)
            found[target : target + length] = piece
        elif kind == "insert":
            found[place:place] = bytes(length)
    return bytes(found)


def image_seeds() -> list[bytes]:
    import images
    from corpus import cases

    names = (
        "progressive cmyk arithmetic lossless restarts multi-picture interlaced 16-bit palette lzw pages animated alpha"
    )
    odd = [
        c.data for c in cases() if c.size and c.folder == "archive/images" and c.name.startswith(tuple(names.split()))
    ]
    formats = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
    return [data for data in odd if len(data) < 50_000] + [images.encode(images.tile(), name) for name in formats] * 2


def check_image(data: bytes, folder: Path) -> str:
    """error_type, or ok."""
    from pipeline.config import Transform
    from pipeline.decode import decode
    from pipeline.errors import DecodeError

    try:
        decoded = decode(data, Transform(resize=36, crop=32), max_pixels=MAX_PIXELS)
    except DecodeError as error:
        error.message.encode()
        return error.error_type
    assert (decoded.pixels.shape, str(decoded.pixels.dtype)) == ((32, 32, 3), "uint8")
    assert 0 < decoded.width * decoded.height <= MAX_PIXELS
    return "ok"


def archive_seeds(folder: str) -> list[bytes]:
    from corpus import OK, cases

    return [case.data for case in cases() if case.folder == folder and OK in case.rows and len(case.data) < 60_000]


def check_archive(kind: str, suffix: str) -> Callable[[bytes, Path], str]:
    """A check of the contract of sources: each row once, in order, named as text, the same from wherever one begins."""
    from pipeline import sources
    from pipeline.coverage import END
    from pipeline.plan import Shard

    def check(data: bytes, folder: Path) -> str:
        path = folder / f"mutated{suffix}"
        path.write_bytes(gzip.compress(data, 0) if suffix.endswith(".gz") else data)
        shard, options = Shard(0, kind, str(path)), sources.ReadOptions()
        items = list(itertools.islice(sources.read(shard, ((0, END),), options), MAX_ROWS))
        rows = [item for item in items if isinstance(item, sources.Record)]
        assert [row.row for row in rows] == list(range(len(rows)))
        assert len({row.image_id for row in rows}) == len(rows)
        for row in rows:
            assert (row.data is None) == (row.error is not None)
            f"{row.image_id} {row.member} {row.error}".encode()
        if len(items) == MAX_ROWS:
            return "many rows"
        assert items[-1] == sources.ShardEnd(len(rows))
        *again, end = sources.read(shard, ((2, END),), options)
        assert [(r.row, r.image_id, r.data) for r in again] == [(r.row, r.image_id, r.data) for r in rows[2:]] or len(
            rows
        ) < 2  # type: ignore[union-attr]
        assert end == sources.ShardEnd(max(len(rows), 2))
        return str({row.error.error_type for row in rows if row.error} or "ok")

    return check


def with_checksums(data: bytes) -> bytes:
    """A tar whose headers' checksums are right again: a reader that stops at each of them finds nothing else."""
    found = bytearray(data)
    for start in range(0, len(found) - 511, 512):
        header = found[start : start + 512]
        if header[257:262] == b"ustar":
            found[start + 148 : start + 156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return bytes(found)


def check_tar(data: bytes, folder: Path) -> str:
    suffix = (".tar", ".tar.gz")[len(data) % 2]
    return check_archive("tar", suffix)(with_checksums(data) if len(data) // 2 % 2 else data, folder)


def abort(data: bytes, folder: Path) -> str:
    os.abort()


TARGETS: dict[str, tuple[Callable[[], list[bytes]], Callable[[bytes, Path], str]]] = {
    "images": (image_seeds, check_image),
    "tar": (lambda: archive_seeds("archive/tars"), check_tar),
    "zip": (lambda: archive_seeds("archive/zips"), lambda data, folder: check_archive("zip", ".zip")(data, folder)),
    "parquet": (
        lambda: archive_seeds("archive/parquets"),
        lambda data, folder: check_archive("parquet", ".parquet")(data, folder),
    ),
    "abort": (lambda: [b"abort"], abort),
}


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def fuzz(target: str, seconds: float, last: Path) -> dict[str, object]:
    """Mutations of the target's seeds for so long; the last one is in the file `last`, whatever happens."""
    make, check = TARGETS[target]
    inputs, deadline, outcomes = make(), time.monotonic() + seconds, Counter[str]()
    folder = last.parent
    if target != "abort":
        for data in inputs:
            check(data, folder)
    before, slowest = peak_mib(), 0.0

    def one(number: int, changed: list[Change]) -> None:
        nonlocal slowest
        if time.monotonic() > deadline:
            return
        data = mutated(inputs[number], changed)
        last.write_bytes(data)
        faulthandler.dump_traceback_later(MAX_SECONDS_EACH, exit=True)
        started = time.monotonic()
        outcomes[check(data, folder)] += 1
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.monotonic() - started)

    checks = settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
                      suppress_health_check=list(HealthCheck))  # fmt: skip
    while time.monotonic() < deadline:
        test = given(st.integers(0, len(inputs) - 1), changes)(one)
        seed(random.randrange(2**32))(checks(test))()
    return {"outcomes": dict(outcomes), "slowest": slowest, "growth_mib": peak_mib() - before}


def run_target(target: str, seconds: float, folder: Path) -> dict[str, object]:
    """Fuzz in a process of its own; fails the test with what it said and where its last input lies."""
    last = folder / "last-input"
    command = [sys.executable, __file__, target, "--seconds", str(seconds), "--last", str(last)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 120)
    if done.returncode:
        pytest.fail(f"{target}: ended with {done.returncode} on the input in {last}:\n{done.stderr[-6000:]}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize(("target", "share"), [("images", 0.4), ("tar", 0.2), ("zip", 0.2), ("parquet", 0.2)])
def test_mutations(target: str, share: float, tmp_path: Path) -> None:
    found = run_target(target, SECONDS * share, tmp_path)
    print(target, found)
    assert len(found["outcomes"]) >= 3, "mutations reach the good way and several errors"  # type: ignore[arg-type]
    assert found["growth_mib"] <= MAX_GROWTH_MIB[target]  # type: ignore[operator]


def test_a_crash_is_seen(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"ended with -6 on the input in .*last-input"):
        run_target("abort", 5, tmp_path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--last", type=Path, default=Path(tempfile.gettempdir()) / "last-input")
    parser.add_argument("--again", type=Path)
    arguments = parser.parse_args()
    if arguments.again:
        print(TARGETS[arguments.target][1](arguments.again.read_bytes(), arguments.again.parent))
    else:
        print(json.dumps(fuzz(arguments.target, arguments.seconds, arguments.last)))


if __name__ == "__main__":
    main()
