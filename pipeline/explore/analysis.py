"""`nightshift analyze`: clusters, outliers, classes and quality of an output, and what changed since an earlier one.

The vectors are read twice: once for a sample, and once, a row group at a time, for every image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import OutputRefused, SettingRefused
from pipeline.explore import class_statistics
from pipeline.explore import clusters as clustering
from pipeline.explore.analysis_files import opened
from pipeline.explore.class_statistics import label_columns
from pipeline.explore.earlier import Earlier, check_pair
from pipeline.explore.image_analysis import ImageAnalysis, Settings
from pipeline.explore.outliers import NEIGHBOURS
from pipeline.explore.table import OnStep, Output, no_step

MAX_NEIGHBOURS = 100


@dataclass(frozen=True)
class Analysis:
    """The results. figures: everything except for the rows of all images, as JSON.

    clusters: see `clusters.SCHEMA`. classes: see `class_statistics.SCHEMA`. After a comparison both have the column
    `earlier_share`. They have no rows if they could not be computed; `notes` says why.
    """

    figures: Mapping[str, Any]
    clusters: pa.Table
    classes: pa.Table

    @property
    def notes(self) -> Sequence[str]:
        """What was left out, and what the user should know."""
        return list(self.figures["notes"])


def analyze(
    output: Output,
    *,
    to: Path | None = None,
    against: Output | None = None,
    clusters: int | None = None,
    method: str = "kmeans",
    sample: int | None = None,
    neighbours: int = NEIGHBOURS,
    label: str | None = None,
    overwrite: bool = False,
    on_step: OnStep = no_step,
) -> Analysis:
    """Analyze an output, and compare it with an earlier one.

    to: a local folder for Parquet files. against: the earlier output. clusters: number of k-means; None to choose it.
    method: kmeans or hdbscan. sample: images that HDBSCAN clusters. neighbours: of an image, whose distance and labels
    count. label: column of classes for the clusters' names and for contradictions; by default the output's own.
    overwrite: replace an earlier analysis. Raises SettingRefused, InputRefused and OutputRefused.
    """
    clustering.check(method, clusters, sample)
    if not 1 <= neighbours <= MAX_NEIGHBOURS:
        raise SettingRefused(f"--neighbours is {neighbours}: it must be a number from 1 to {MAX_NEIGHBOURS}")
    for each in (output, *([against] if against else [])):
        each.require([])
        if not each.rows:
            raise OutputRefused(f"{each.uri} has no rows of results, only {each.error_rows:,} errors")
    labels = label_columns(output, label)
    with opened(to, overwrite) as files:
        if against:
            check_pair(output, against)
        images = ImageAnalysis(output, labels, Settings(method, clusters, sample, neighbours), on_step)
        earlier = Earlier(against, images, on_step) if against else None
        columns = list(dict.fromkeys([*images.columns, *(earlier.comparer.content if earlier else ())]))
        for block in output.blocks(columns):
            similarity = earlier.add(block.table, files) if earlier else None
            files.write_images(images.add(block.table, block.positions, similarity))
            on_step("looking at every image", int(block.positions[-1]) + 1, output.rows)
        if earlier:
            earlier.add_gone(files)
        analysis = _joined(images, earlier)
        files.write_analysis(analysis.figures, analysis.clusters, analysis.classes)
    return analysis


def _joined(images: ImageAnalysis, earlier: Earlier | None) -> Analysis:
    """The results of all blocks."""
    clusters = images.tally.table() if images.tally else clustering.SCHEMA.empty_table()
    classes = pa.concat_tables([class_statistics.SCHEMA.empty_table(), *(each.table() for each in images.classes)])
    if earlier:
        clusters, classes = earlier.with_shares(clusters, classes)
    output, figures = images.output, _of_vectors(images, clusters)
    figures = {
        "output": output.uri,
        "rows": output.rows,
        "errors": output.error_rows,
        "is_finished": output.is_finished,
        **figures,
        "classes": classes.to_pylist(),
        "quality": images.flags,
        **({"against": earlier.figures()} if earlier else {}),
        "notes": [*images.notes(), *(earlier.notes if earlier else [])],
    }
    return Analysis(figures, clusters, classes)


def _of_vectors(images: ImageAnalysis, clusters: pa.Table) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if images.clusters and images.tally:
        figures["clusters"] = {
            "how": images.clusters.how,
            "in_no_cluster": images.tally.noise,
            "rows": clusters.to_pylist(),
        }
    if compared := images.neighbourhoods:
        figures["outliers"] = {
            "how": f"distance to neighbour {compared.count} among {compared.reference.describe()}",
            "median_distance": compared.scale[0],
            "limit": compared.scale[1],
            "images": images.outlier_count,
            "rows": images.outliers.rows("image_id", "outlier", "cluster", "label"),
        }
        if images.labels:
            names = ("image_id", "label", "neighbour_label", "contradiction")
            figures["contradictions"] = {
                "column": images.labels[0].name,
                "images": images.contradicted_count,
                "rows": images.contradicted.rows(*names),
            }
    return figures
