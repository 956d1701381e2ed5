"""Boxes on the Earth, and masks of chosen rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from outputs import write_output

from pipeline import open_output
from pipeline.errors import SettingRefused
from pipeline.explore.choices import Box, Where, as_mask
from pipeline.schema import FOOTPRINT

BOXES = [
    {"xmin": 10.0, "ymin": 45.0, "xmax": 11.0, "ymax": 46.0},
    {"xmin": 179.0, "ymin": -1.0, "xmax": 179.5, "ymax": 1.0},
    {"xmin": -180.0, "ymin": 0.0, "xmax": -179.0, "ymax": 2.0},
    {"xmin": -180.0, "ymin": 60.0, "xmax": 180.0, "ymax": 61.0},
    None,
]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((10.5, 45.5, 12.0, 47.0), [0]),
        ((11.0, 46.0, 12.0, 47.0), [0]),
        ((11.1, 45.0, 12.0, 47.0), []),
        ((178.0, -2.0, -178.0, 2.0), [1, 2]),
        ((-180.0, -90.0, 180.0, 90.0), [0, 1, 2, 3]),
    ],
)
def test_a_box_chooses_footprints_that_touch_it(bounds: tuple[float, float, float, float], expected: list[int]) -> None:
    rows = pa.table({"bbox": pa.array(BOXES, FOOTPRINT.field("bbox").type)})
    assert np.flatnonzero(Box(bounds)(rows)).tolist() == expected


def test_a_mask_has_one_value_per_row_of_the_output(tmp_path: Path) -> None:
    ids = [f"/p/{number}.jpg" for number in range(20)]
    output = open_output(str(write_output(tmp_path / "out", ids, np.ones((20, 4), np.float32))))
    mask = as_mask([Where.of(output, "row % 5 = 0"), Where.of(output, "row > 4")], output)
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == [5, 10, 15]
    assert as_mask([], output) is None


def test_a_bad_box_is_refused(tmp_path: Path) -> None:
    output = open_output(str(write_output(tmp_path / "out", ["/a"], np.ones((1, 4), np.float32))))
    with pytest.raises(SettingRefused, match="--bbox is '1,2,3': it must be W,S,E,N in degrees"):
        output.search(ids=["/a"], bbox="1,2,3")
