"""The hits of a search for people: a table on the terminal, and an HTML page with pictures in one file."""

import base64
from importlib import resources
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pipeline.errors import printable
from pipeline.explore.choices import need_search
from pipeline.explore.pictures import pictures
from pipeline.explore.search import Hits
from pipeline.explore.table import Output

MAX_PICTURES = 500
WIDTH = 200
"""Columns of a table that goes to a file."""


def show(hits: Hits, console: Console | None = None) -> None:
    """Print a table per query: rank, similarity, image_id, and label and score if the output has them."""
    console = console or Console()
    console = console if console.is_terminal or console.record else Console(width=WIDTH)
    own = [name for name in ("label", "score") if name in hits.table.column_names]
    for query, rows in _by_query(hits):
        table = Table(
            "",
            "similarity",
            Column("image_id", overflow="fold"),
            *own,
            title=Text(printable(query)),
            title_justify="left",
        )
        for row in rows:
            values = [_text(row[name]) for name in own]
            table.add_row(str(row["rank"]), f"{row['similarity']:.4f}", Text(printable(row["image_id"])), *values)
        console.print(table)


def html(output: Output, hits: Hits) -> str:
    """The page. Pictures are read from the archive; MAX_PICTURES at most. Every name is escaped.

    Raises SettingRefused without Jinja.
    """
    need_search("a page of hits", "jinja2")
    from jinja2 import Environment

    rows = hits.table.select(["image_id"])["image_id"].to_pylist()
    seen = pictures(output, list(dict.fromkeys(rows))[:MAX_PICTURES])
    groups = [
        (query, [{**row, "picture": base64.b64encode(seen.get(row["image_id"], b"")).decode()} for row in found])
        for query, found in _by_query(hits)
    ]
    text = resources.files(__package__).joinpath("search.html").read_text()
    template = Environment(autoescape=True).from_string(text)
    title = f"Similar images in {output.uri.rstrip('/').rpartition('/')[2]}"
    return template.render(title=title, summary=output.describe(), groups=groups)


def _by_query(hits: Hits) -> list[tuple[str, list[dict[str, Any]]]]:
    names = ("query", "rank", "similarity", "image_id", "label", "score")
    rows = hits.table.select([name for name in names if name in hits.table.column_names]).to_pylist()
    return [(query, list(group)) for query, group in groupby(rows, key=lambda row: str(row["query"]))]


def _text(value: Any) -> Text:
    return Text(f"{value:.3f}" if isinstance(value, float) else printable(str(value)))
