"""The README pages as text: their code blocks, their prose and their tables."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
        *(
            str(path.relative_to(ROOT))
            for wing in ("pipeline", "jobs", "infra")
            for path in ROOT.glob(f"{wing}/**/*.md")
        ),
    ]
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


def prose(page: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)


def code_spans(page: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(page))


def tables(page: str, header: str) -> list[list[str]]:
    """The rows of all tables of a page with this header, as lists of cells."""
    lines = text_of(page).splitlines()
    rows = []
    for start in [number for number, line in enumerate(lines) if line == header]:
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert rows, f"{page} has no table {header}"
    return rows
