"""Windows of a scene: each pixel is in one, and none leaves the scene."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.geo.windows import Axis, Part, Span, parts


def spans(axis: Axis) -> list[Span]:
    return [axis.span(index) for index in range(axis.count)]


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(1000, 224, 224, "pad"), [(0, 224), (224, 224), (448, 224), (672, 224), (896, 104)]),
        (Axis(1000, 224, 224, "drop"), [(0, 224), (224, 224), (448, 224), (672, 224)]),
        (Axis(1000, 224, 224, "shift"), [(0, 224), (224, 224), (448, 224), (672, 224), (776, 224)]),
        (Axis(448, 224, 224, "pad"), [(0, 224), (224, 224)]),
        (Axis(448, 224, 224, "shift"), [(0, 224), (224, 224)]),
        (Axis(448, 224, 112, "pad"), [(0, 224), (112, 224), (224, 224)]),
        (Axis(450, 224, 112, "pad"), [(0, 224), (112, 224), (224, 224), (336, 114)]),
        (Axis(100, 224, 224, "pad"), [(0, 100)]),
        (Axis(100, 224, 224, "shift"), [(0, 100)]),
        (Axis(100, 224, 224, "drop"), []),
        (Axis(1000, 100, 450, "pad"), [(0, 100), (450, 100), (900, 100)]),
        (Axis(910, 100, 450, "pad"), [(0, 100), (450, 100), (900, 10)]),
        (Axis(860, 100, 450, "pad"), [(0, 100), (450, 100)]),
    ],
)
def test_where_windows_are(axis: Axis, expected: list[tuple[int, int]]) -> None:
    assert [(span.start, span.length) for span in spans(axis)] == expected
    assert all(span.pixels == span.length for span in spans(axis))


def test_windows_of_other_resolutions() -> None:
    assert spans(Axis(1000, 224, 224, "pad", 2.0)) == [Span(0, 448, 224), Span(448, 448, 224), Span(896, 104, 52)]
    assert spans(Axis(100, 100, 100, "pad", 0.5)) == [Span(0, 50, 100), Span(50, 50, 100)]
    assert spans(Axis(10, 224, 224, "pad", 100.0)) == [Span(0, 10, 1)]


@pytest.mark.parametrize(
    ("size", "stride", "factor", "rounding"),
    [
        (7, 7, 0.3, 1 / 2.1),
        (10, 10, 0.3, 0),
        (10, 5, 0.3, 1 / 3),
        (224, 224, 1 / 3, 3 / 224),
        (64, 32, 2, 0),
        (3, 3, 1, 0),
    ],
)
def test_how_far_windows_are_off(size: int, stride: int, factor: float, rounding: float) -> None:
    axis = Axis(1000, size, stride, "pad", factor)
    assert axis.rounding == pytest.approx(rounding)
    inner = spans(axis)[: (1000 - size) // stride]
    off = max(abs(span.length / (size * factor) - 1) for span in inner if span.pixels == size)
    assert off <= axis.rounding + 1e-9


@given(
    st.integers(1, 3000),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(["pad", "drop", "shift"]),
    st.sampled_from([1.0, 2.0, 3.7, 0.5]),
)
def test_windows_cover_the_scene_and_stay_inside(length: int, size: int, stride: int, edge: str, factor: float) -> None:
    axis = Axis(length, size, stride, edge, factor)
    covered = np.zeros(length, int)
    for span in spans(axis):
        assert 0 <= span.start < span.start + span.length <= length
        assert 1 <= span.pixels <= size
        covered[span.start : span.start + span.length] += 1
    assert len({span.start for span in spans(axis)}) == axis.count or factor < 1
    if stride <= size and edge != "drop":
        assert covered.all()


@given(
    st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([224, 256, 100]), st.sampled_from([1, 16, 256, 512])
)
def test_parts_hold_each_window_once(width: int, height: int, size: int, block: int) -> None:
    across, down = Axis(width, size, size, "pad"), Axis(height, size, size, "pad")
    pieces = list(parts(across, down, (block, block), 40))
    places = [part.place(number) for part in pieces for number in range(part.count)]
    assert sorted(places) == [(column, row) for column in range(across.count) for row in range(down.count)]
    assert all(part.stop_column - part.first_column <= 40 and part.count <= 4 * 2048 for part in pieces)


def test_parts_end_where_a_block_of_the_file_does() -> None:
    pieces = list(parts(Axis(100_000, 224, 224, "pad"), Axis(100_000, 224, 224, "pad"), (512, 512), 200))
    assert {part.first_column * 224 % 512 for part in pieces} == {0}
    assert {part.first_row * 224 % 512 for part in pieces} == {0}
    assert pieces[0] == Part(0, 192, 0, 16)
