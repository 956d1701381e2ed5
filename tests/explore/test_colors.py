"""Files of colours of classes."""

from pathlib import Path

import pytest

from pipeline.errors import SettingRefused
from pipeline.explore.colors import read_colors


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "colors.csv"
    path.write_text(text)
    return str(path)


def test_colours_are_numbers_or_names(tmp_path: Path) -> None:
    uri = written(tmp_path, '\ufefflabel,color\nwater,#0a64C8\n"forest, dense",forestgreen\nsnow, #fff\n')
    assert read_colors(uri) == {"water": (10, 100, 200), "forest, dense": (34, 139, 34), "snow": (255, 255, 255)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,color\nwater,bluish\n", "line 2: 'bluish' must be #RRGGBB or a colour name of CSS"),
        ("label,color\nwater,#0064c880\n", "line 2: '#0064c880' must be"),
        ("label,color\nwater,\n", "line 2 has no label or no color; the first line must be label,color"),
        ("water,blue\nforest,green\n", "line 2 has no label or no color"),
        ("label;color\nwater;blue\n", "line 2 has no label or no color"),
        ("label,color\nwater,blue\nwater,navy\n", "line 3 gives water a second color"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        read_colors(written(tmp_path, text))


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match=r"none\.csv does not exist"):
        read_colors(str(tmp_path / "none.csv"))
    (tmp_path / "map.tif").write_bytes(b"II*\0\xff\xfe")
    with pytest.raises(SettingRefused, match="cannot be read"):
        read_colors(str(tmp_path / "map.tif"))
