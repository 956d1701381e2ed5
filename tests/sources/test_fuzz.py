"""Mutated images and archives, in separate processes: no crash, no hang, no unexpected exception, bounded memory.

Runs for a few seconds, or for NIGHTSHIFT_FUZZ_SECONDS. A failure names the file that holds the last input;
`python tests/sources/test_fuzz.py <target> --again FILE` runs that input again.
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
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from pipeline.images.values import Values

ROOT = Path(__file__).resolve().parents[2]
SECONDS = float(os.environ.get("NIGHTSHIFT_FUZZ_SECONDS", "6"))
MIN_INPUTS = 250
"""Inputs to try at least, since a busy machine tries few in a few seconds."""

MAX_SECONDS_EACH = 10
MAX_PIXELS = 4_000_000
MAX_ROWS = 5000
"""Rows to read at most, since the header of a mutated archive may contain any number of rows."""

MAX_GROWTH_MIB = {
    "images": 24 * MAX_PIXELS >> 20,
    "tiff": 32 * MAX_PIXELS >> 20,
    "tar": 96,
    "zip": 96,
    "parquet": 96,
    "abort": 96,
}
"""Limit of the peak memory above that of the seeds: 24 bytes per pixel, or the buffers of the readers."""

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
    """Apply each change at a share of the length. Odd numbers prefer the header; most changes spare the magic bytes."""
    mutant = bytearray(data)
    for kind, share, number, length in changed:
        place = int((share**4 if number % 2 else share) * max(len(mutant) - 1, 0)) + (4 if number % 8 else 0)
        piece = bytes(mutant[place : place + length])
        if kind == "byte":
            mutant[place : place + 1] = bytes([number >> 8])
        elif kind == "bit" and piece:
            mutant[place] ^= 1 << length % 8
        elif kind == "word":
            mutant[place : place + 4] = WORDS[number % len(WORDS)]
        elif kind == "cut":
            del mutant[max(place, 1) :]
        elif kind == "delete":
            del mutant[place : place + length]
        elif kind == "repeat":
            mutant[place:place] = piece * (number % 50)
        elif kind == "move":
            target = number % (len(mutant) + 1)
            mutant[target : target + length] = piece
        elif kind == "insert":
            mutant[place:place] = bytes(length)
    return bytes(mutant)


def image_seeds() -> list[bytes]:
    import images
    from corpus import cases

    names = (
        "progressive cmyk arithmetic lossless restarts multi-picture interlaced 16-bit palette lzw pages animated alpha"
    )
    odd = [
        c.data for c in cases() if c.size and c.folder == "archive/images" and c.name.startswith(tuple(names.split()))
    ]
    formats = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "PPM")
    return [data for data in odd if len(data) < 50_000] + [images.encode(images.tile(), name) for name in formats] * 2


def tiff_seeds() -> list[bytes]:
    """TIFFs that tifffile reads: number types, layouts, compressions, pages."""
    import io

    import numpy as np
    import tifffile

    deep = np.random.default_rng(0).integers(0, 4000, (40, 50, 4)).astype(np.uint16)
    planes, eight = np.moveaxis(deep, 2, 0), (deep[..., :3] >> 4).astype(np.uint8)
    plain = {"photometric": "minisblack", "metadata": None}
    contig, separate = plain | {"planarconfig": "contig"}, plain | {"planarconfig": "separate"}
    rgb = contig | {"photometric": "rgb"}
    nodata = [(42113, "s", 0, "-9999", True)]
    kinds = [
        *((deep, contig | {"compression": name}) for name in (None, "lzw", "zlib", "zstd", "lzma", "packbits")),
        *((planes, separate | {"compression": name, "tile": (16, 16)}) for name in (None, "lzw", "zlib")),
        (deep, contig | {"compression": "zlib", "predictor": True, "rowsperstrip": 7}),
        (deep[..., 0].astype(np.float32), plain | {"compression": "zlib", "predictor": 3, "extratags": nodata}),
        (deep[..., 0].astype(np.float64), plain),
        (deep[..., 0].astype(np.int16), plain | {"photometric": "miniswhite"}),
        (deep[..., 0], plain | {"bitspersample": 12}), (deep[..., 0], plain | {"compression": "lerc"}),
        (deep[..., 0], plain | {"compression": "lerc", "compressionargs": {"compression": "deflate"}}),
        (deep[..., 0], plain | {"compression": "jpeg2000", "tile": (32, 32)}),
        (eight, rgb | {"compression": "webp"}), (np.moveaxis(eight, 2, 0), separate | {"compression": "jpeg"}),
        (deep, contig | {"photometric": "separated"}), (deep, rgb | {"extrasamples": [1]}),
    ]  # fmt: skip
    seeds = []
    for number, (array, options) in enumerate(kinds):
        buffer = io.BytesIO()
        order = "<" if options.get("compression") in ("lerc", "jpeg2000", "webp", "jpeg") else "<>"[number % 2]
        with tifffile.TiffWriter(buffer, byteorder=order, bigtiff=number % 3 == 0) as file:
            if number % 5 == 0:
                file.write(eight, subfiletype=1, subifds=1 if number % 10 == 0 else None, **rgb)
            file.write(array, **options)
        seeds.append(buffer.getvalue())
    return [data for data in seeds if len(data) < 60_000]


def check_tiff(data: bytes, folder: Path) -> str:
    from pipeline.images.pixels import PixelFormat
    from pipeline.images.values import Values

    pairs = [
        Values(scale=(0.0, 4000.0)),
        Values(("1",), (0.0, 4000.0)),
        Values(("3", "1", "1"), (-1.0, 9.0), 0.0),
        Values(pixel_format=PixelFormat("float32", 4)),
        Values(pixel_format=PixelFormat("uint8", 1)),
    ]
    return check_image(data, folder, pairs[len(data) % len(pairs)])


def check_image(data: bytes, folder: Path, values: "Values | None" = None) -> str:
    """The error_type, or ok."""
    from pipeline.errors import DecodeError
    from pipeline.images.decode import decode
    from pipeline.images.transform import Transform
    from pipeline.images.values import DEFAULT

    values = values or DEFAULT
    try:
        decoded = decode(data, Transform(resize=36, crop=32), max_pixels=MAX_PIXELS, values=values)
    except DecodeError as error:
        error.message.encode()
        return error.error_type
    format = values.pixel_format
    assert (decoded.pixels.shape, str(decoded.pixels.dtype)) == ((32, 32, format.bands), format.dtype)
    assert 0 < decoded.width * decoded.height <= MAX_PIXELS
    return "ok"


def archive_seeds(folder: str) -> list[bytes]:
    from corpus import OK, cases

    return [case.data for case in cases() if case.folder == folder and OK in case.rows and len(case.data) < 60_000]


def check_archive(kind: str, suffix: str) -> Callable[[bytes, Path], str]:
    """Check the contract of sources: each row once, in order, with a valid name, and the same from any first row."""
    from pipeline import sources
    from pipeline.coverage import END
    from pipeline.sources.shard import Shard

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
        assert isinstance(items[-1], sources.ShardEnd)
        assert items[-1].rows == len(rows)
        *again, end = sources.read(shard, ((2, END),), options)
        assert [(r.row, r.image_id, r.data) for r in again] == [(r.row, r.image_id, r.data) for r in rows[2:]] or len(
            rows
        ) < 2  # type: ignore[union-attr]
        assert end.rows == max(len(rows), 2)  # type: ignore[union-attr]
        return str({row.error.error_type for row in rows if row.error} or "ok")

    return check


def with_checksums(data: bytes) -> bytes:
    """Correct the checksums of a tar's headers. Readers stop at a wrong checksum and would see no other mutation."""
    mutant = bytearray(data)
    for start in range(0, len(mutant) - 511, 512):
        header = mutant[start : start + 512]
        if header[257:262] == b"ustar":
            mutant[start + 148 : start + 156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return bytes(mutant)


def check_tar(data: bytes, folder: Path) -> str:
    suffix = (".tar", ".tar.gz")[len(data) % 2]
    return check_archive("tar", suffix)(with_checksums(data) if len(data) // 2 % 2 else data, folder)


def abort(data: bytes, folder: Path) -> str:
    os.abort()


TARGETS: dict[str, tuple[Callable[[], list[bytes]], Callable[[bytes, Path], str]]] = {
    "images": (image_seeds, check_image),
    "tiff": (tiff_seeds, check_tiff),
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
    """Check mutations of the seeds for `seconds`, and at least MIN_INPUTS. The file `last` holds the last input."""
    make, check = TARGETS[target]
    inputs, deadline, outcomes = make(), time.monotonic() + seconds, Counter[str]()
    folder = last.parent
    if target != "abort":
        for data in inputs:
            check(data, folder)
    before, slowest = peak_mib(), 0.0

    def is_over() -> bool:
        return time.monotonic() > deadline and outcomes.total() >= MIN_INPUTS

    def one(number: int, changed: list[Change]) -> None:
        nonlocal slowest
        if is_over():
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
    while not is_over():
        test = given(st.integers(0, len(inputs) - 1), changes)(one)
        seed(random.randrange(2**32))(checks(test))()
    return {"outcomes": dict(outcomes), "slowest": slowest, "growth_mib": peak_mib() - before}


def run_target(target: str, seconds: float, folder: Path) -> dict[str, object]:
    """Fuzz in a separate process. Fails the test with its stderr and the path of its last input."""
    last = folder / "last-input"
    command = [sys.executable, __file__, target, "--seconds", str(seconds), "--last", str(last)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 120)
    if done.returncode:
        pytest.fail(f"{target}: ended with {done.returncode} on the input in {last}:\n{done.stderr[-6000:]}")
    statistics: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return statistics


@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize(
    ("target", "share"), [("images", 0.4), ("tiff", 0.4), ("tar", 0.2), ("zip", 0.2), ("parquet", 0.2)]
)
def test_mutations(target: str, share: float, tmp_path: Path) -> None:
    statistics = run_target(target, SECONDS * share, tmp_path)
    print(target, statistics)
    assert len(statistics["outcomes"]) >= 3, "valid inputs and several kinds of errors"  # type: ignore[arg-type]
    assert statistics["growth_mib"] <= MAX_GROWTH_MIB[target]  # type: ignore[operator]


def test_a_crash_fails_the_test(tmp_path: Path) -> None:
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
