"""Descriptions of the files of an archive that are not read, with a remedy."""

from collections import Counter
from collections.abc import Mapping

from pipeline.sources.suffixes import OTHERS

MAX_SUFFIXES_SHOWN = 12

KINDS = {
    "vector tiles": ((".mvt", ".pbf"), "render them as PNG"),
    "NumPy files": ((".npy", ".npz"), "save the arrays as PNG"),
    "TFRecords": ((".tfrecord", ".tfrecords", ".tfrec"), "write the images to tars or Parquet"),
    "DICOM files": ((".dcm", ".dicom"), "export them as PNG"),
    "HDF5 files": ((".h5", ".hdf5", ".he5"), "write the images to tars or Parquet"),
    "Zarr arrays": ((".zarr",), "write the images to tars or Parquet"),
    "NetCDF files": ((".nc", ".nc4"), "export them as GeoTIFF"),
    "LMDB databases": ((".mdb", ".lmdb"), "write the images to tars or Parquet"),
    "SQLite databases": ((".sqlite", ".sqlite3", ".db", ".gpkg"), "write the images to tars or Parquet"),
    "MXNet records": ((".rec",), "write the images to tars or Parquet"),
    "pickles": ((".pkl", ".pickle"), "write the images to tars or Parquet"),
    "Arrow and Feather files": ((".arrow", ".feather"), "convert them to Parquet"),
    "JSON Lines": ((".jsonl", ".ndjson"), "convert them to Parquet or CSV"),
    "7z archives": ((".7z",), "extract them, or pack the images as tar or zip"),
    "RAR archives": ((".rar",), "extract them, or pack the images as tar or zip"),
    "xz and bzip2 archives": ((".xz", ".txz", ".bz2", ".tbz", ".tbz2"), "compress them with zstd or gzip, as .tar.zst"),
    "raw photographs": (
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"),
        "export them as JPEG or TIFF",
    ),
    "videos": ((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"), "extract the frames as images"),
    "PDF files": ((".pdf",), "render the pages as images"),
    "vector graphics": ((".svg", ".svgz", ".eps", ".ai"), "render them as PNG"),
    "Photoshop files": ((".psd", ".psb"), "export them as PNG"),
    "OpenEXR and HDR images": ((".exr", ".hdr"), "convert them to TIFF"),
}
"""Kind of file → its suffixes, and how to make it readable."""

NOTES = {
    " hidden": "names that begin with a dot are not read; rename them",
    " broken link": "the targets of links do not exist",
}
"""Note of a count → why it is left out."""

_KIND_OF_SUFFIX = {suffix: kind for kind, (suffixes, _) in KINDS.items() for suffix in suffixes}


def describe(counts: Mapping[str, int]) -> str:
    """The numbers as text, the largest first: `12 .npy, 3 .dcm (not read)`. "" if there are none."""
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {suffix}" for suffix, count in ordered[:MAX_SUFFIXES_SHOWN]]
    if rest := sum(count for _, count in ordered[MAX_SUFFIXES_SHOWN:]):
        shown.append(f"{rest:,} {OTHERS}")
    return f"{', '.join(shown)} (not read)"


def remedy(counts: Mapping[str, int]) -> str:
    """Which kinds of files are not read, and what to do about it: one clause per kind, at most three."""
    kinds: Counter[str] = Counter()
    for suffix, count in counts.items():
        kind = _KIND_OF_SUFFIX.get(suffix) or _KIND_OF_SUFFIX.get("." + suffix.rpartition(".")[2])
        kinds[kind or ""] += count
    known = [kind for kind, _ in kinds.most_common() if kind][:3]
    clauses = [f"{kind} are not read; {KINDS[kind][1]}" for kind in known]
    return "; ".join(clauses or [text for note, text in NOTES.items() if any(key.endswith(note) for key in counts)])


def describe_unended(tars: int) -> str:
    """A sentence about tars that end without an end mark."""
    have = "tar has no end mark: it" if tars == 1 else "tars have no end mark: they"
    return f"{tars:,} {have} may be cut, and images may be missing"


def describe_empty(shards: int) -> str:
    """A sentence about shards without an image, with the remedy."""
    have = "tar or zip has" if shards == 1 else "tars or zips have"
    return f"{shards:,} {have} no member whose name is that of an image; --any-suffix looks at the first bytes"
