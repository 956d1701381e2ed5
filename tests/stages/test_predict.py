"""The predict stage over tables. A row keeps its identity and its result, whatever happens to other rows."""

import re
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from pipeline import schema
from pipeline.errors import DecodeError, NightshiftError, SettingRefused
from pipeline.images import pixels
from pipeline.images.pixels import Decoded, Encoded
from pipeline.images.transform import Transform
from pipeline.predictors.base import Allotment, Predictor
from pipeline.stages import usage
from pipeline.stages.predict import Predict

CROP = 4
ALLOTMENT = Allotment(batch_size=1)


class Mean(Predictor):
    """The mean pixel. Raises for a batch with a 255; gives NaN for a 254."""

    transform = Transform(resize=CROP, crop=CROP)
    columns = pa.schema([("mean", pa.float32()), ("vector", pa.list_(pa.float32(), 2))])

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        self.batches.append(len(pixels))
        first = pixels[:, 0, 0, 0]
        if (first == 255).any():
            raise ValueError("it is white")
        mean = first.astype(np.float32)
        vector = np.stack([mean, np.where(first == 254, np.nan, mean)], axis=1)
        return {"mean": mean, "vector": vector}


def table(values: list[int | None]) -> pa.Table:
    """One row per value: an image of that grey, or for None a row that failed earlier."""
    decoded = [None if v is None else Decoded(np.full((CROP, CROP, 3), v, np.uint8), CROP, CROP) for v in values]
    rows = len(values)
    columns = {
        "image_id": [f"i{n}" for n in range(rows)],
        "shard": [0] * rows,
        "row": list(range(rows)),
        **pixels.to_columns(decoded),
        "stage": [None if v is not None else "decode" for v in values],
        "error_type": [None if v is not None else "empty" for v in values],
    }
    types = schema.loaded({})
    made = {f.name: columns.get(f.name, [None] * rows) for f in types}
    return pa.table(
        {n: c if isinstance(c, pa.Array) else pa.array(c, types.field(n).type) for n, c in made.items()}, schema=types
    )


def predicted(values: list[int | None]) -> tuple[list[dict], Mean]:
    stage = Predict(predictor := Mean(), {}, ALLOTMENT)
    found = stage(table(values))
    assert found.schema == schema.predicted(Mean.columns, {})
    return found.to_pylist(), predictor


def test_each_row_gets_its_own_result() -> None:
    rows, predictor = predicted([5, None, 7, 9, None])
    assert [row["mean"] for row in rows] == [5, None, 7, 9, None]
    assert [row["vector"] for row in rows] == [[5, 5], None, [7, 7], [9, 9], None]
    assert [row["error_type"] for row in rows] == [None, "empty", None, None, "empty"]
    assert predictor.batches == [3]


@pytest.mark.parametrize(("gpu_share", "gpu_seconds"), [(None, 0.0), (0.5, 0.5 * 0.05)])
def test_the_usage_of_a_table_is_attached_to_its_rows(gpu_share: float | None, gpu_seconds: float) -> None:
    class Slow(Mean):
        def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
            time.sleep(0.05)
            return super().predict(pixels)

    predictor = Slow()
    rows = table([5, None, 7])
    for name in schema.USAGE.names:
        used = pa.array([10.0] * len(rows), pa.float32())
        rows = rows.set_column(rows.schema.get_field_index(name), name, used)
    stage = Predict(predictor, {}, Allotment(gpu_share=gpu_share))
    before = time.process_time()
    usage.take_core_seconds()
    found = stage(rows)
    core_seconds, gpu = (sum(found[name].to_pylist()) - 30 for name in schema.USAGE.names)
    assert -1e-4 < core_seconds <= time.process_time() - before + 0.02
    assert gpu_seconds <= gpu + 1e-4, "as long as the batch took, by the share of a GPU"
    assert gpu == pytest.approx(0, abs=1e-4) or gpu_share


def test_a_slice_of_a_table_gives_its_own_rows() -> None:
    found = Predict(Mean(), {}, ALLOTMENT)(table([1, 2, 3, 4, 5]).slice(2, 2)).to_pylist()
    assert [(row["image_id"], row["mean"]) for row in found] == [("i2", 3), ("i3", 4)]


def test_a_batch_that_fails_is_halved_until_the_bad_image_is_alone() -> None:
    rows, predictor = predicted([1, 2, 255, 4, None, 6])
    assert [row["mean"] for row in rows] == [1, 2, None, 4, None, 6]
    assert (rows[2]["stage"], rows[2]["error_type"]) == ("predict", "failed")
    assert re.fullmatch(rf"ValueError: it is white \({re.escape(__file__)}:\d+\)", rows[2]["message"])
    assert max(predictor.batches[1:]) < 5


class Small(Mean):
    """Has memory for three images at once, and none for an image of 253."""

    def __init__(self) -> None:
        super().__init__()
        self.shrunk: list[int] = []

    def limit_batch(self, batch_size: int) -> None:
        self.shrunk.append(batch_size)

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        if len(pixels) > 3 or (pixels == 253).any():
            self.batches.append(len(pixels))
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().predict(pixels)


def test_a_batch_that_does_not_fit_is_halved_and_the_size_that_fits_is_kept() -> None:
    stage = Predict(predictor := Small(), {}, ALLOTMENT)
    first = stage(table(list(range(12)))).to_pylist()
    assert [row["mean"] for row in first] == list(range(12))
    assert predictor.batches == [12, 6, 3, 3, 6, 3, 3]
    assert predictor.shrunk == [6, 3, 3]
    predictor.batches.clear()
    second = stage(table([*range(7)])).to_pylist()
    assert [row["mean"] for row in second] == list(range(7))
    assert predictor.batches == [3, 3, 1]


def test_one_image_that_never_fits_does_not_make_all_batches_small() -> None:
    stage = Predict(predictor := Small(), {}, ALLOTMENT)
    rows = stage(table([1, 253])).to_pylist()
    assert [row["error_type"] for row in rows] == [None, "out_of_memory"]
    predictor.batches.clear()
    stage(table([1, 2, 3]))
    assert predictor.batches == [3]


def test_a_batch_size_that_one_image_made_small_comes_back() -> None:
    stage = Predict(predictor := Small(), {}, ALLOTMENT)
    stage(table([1, 253, 2, 3]))
    assert predictor.shrunk[-1] == 4


class Shared(Mean):
    """On a GPU whose memory another process takes during some calls."""

    images_are_alike = True
    taken = 0

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        if self.taken:
            self.taken -= 1
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().predict(pixels)

    def decode(self, jpegs: Sequence[Encoded]) -> tuple[np.ndarray, dict[int, DecodeError]]:
        self.predict(np.empty(0))
        raise AssertionError


def test_no_image_is_blamed_for_memory_that_another_process_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.predict.MEMORY_PAUSES", (0.01, 0.01))
    stage = Predict(predictor := Shared(), {}, ALLOTMENT)
    stage(table([1, 2, 3, 4]))
    predictor.taken = 4
    assert [row["mean"] for row in stage(table([1, 2, 3, 4])).to_pylist()] == [1, 2, 3, 4]
    assert stage.max_images is None, "batches are as large as before"
    predictor.taken = 10**6
    for other in (stage, Predict(predictor, {}, ALLOTMENT)):
        with pytest.raises(NightshiftError, match="does not hold one image: CUDA out of memory"):
            other(jpegs([1, 2]))
    with pytest.raises(NightshiftError, match="does not hold one image: CUDA out of"):
        stage(table([1, 2]))


@pytest.mark.parametrize(
    "said",
    [
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "FIND was unable to find an engine to execute this computation",
    ],
)
def test_messages_of_libraries_about_full_memory_are_recognised(said: str) -> None:
    class Full(Mean):
        def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
            raise RuntimeError(f"error: {said}")

    (row,) = Predict(Full(), {}, ALLOTMENT)(table([1])).to_pylist()
    assert row["error_type"] == "out_of_memory"


class Lost(Mean):
    """On a GPU that an image of 255 breaks for good."""

    def lost(self) -> bool:
        return bool(self.batches) and self.batches[-1] == 0

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        if (pixels == 255).any():
            self.batches.append(0)
        if self.lost():
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors …")
        return super().predict(pixels)

    def decode(self, jpegs: Sequence[Encoded]) -> tuple[np.ndarray, dict[int, DecodeError]]:
        self.predict(np.full(1, 255))
        raise AssertionError


def test_a_lost_gpu_ends_the_run_and_no_image_is_blamed() -> None:
    stage = Predict(Lost(), {}, ALLOTMENT)
    assert [row["mean"] for row in stage(table([1, 2])).to_pylist()] == [1, 2]
    for values in ([1, 255, 3], [1]):
        with pytest.raises(NightshiftError, match=r"no longer answers: CUDA .* was encountered; what was com"):
            stage(table(values))
    with pytest.raises(NightshiftError, match="no longer answers"):
        Predict(Lost(), {}, ALLOTMENT)(jpegs([1, 2]))


def jpegs(values: list[int]) -> pa.Table:
    """Rows of images that are left encoded, one byte each."""
    rows = table([0] * len(values))
    encoded = [Encoded(bytes([value]), 1, 1, 1) for value in values]
    for name, column in pixels.to_columns(encoded).items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows


class Decoding(Mean):
    """Decodes a JPEG to an image with the grey of its byte, at most two at once. Raises for 255, refuses 0."""

    def decode(self, jpegs: Sequence[Encoded]) -> tuple[np.ndarray, dict[int, DecodeError]]:
        values = [bytes(jpeg.data)[0] for jpeg in jpegs]
        if 0 in values:
            raise SettingRefused("it decodes nothing")
        if 255 in values or len(values) > 2:
            raise RuntimeError("CUDA out of memory" if len(values) > 2 else "no JPEG")
        errors = {place: DecodeError("corrupt", "") for place, value in enumerate(values) if value == 254}
        good = [value for value in values if value != 254]
        return np.repeat(good, CROP * CROP * 3).astype(np.uint8).reshape(-1, CROP, CROP, 3), errors

    def join(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(pixels)


def test_jpegs_that_cannot_be_decoded_together_are_decoded_in_halves() -> None:
    rows = Predict(predictor := Decoding(), {}, ALLOTMENT)(jpegs([1, 2, 3, 255, 5, 254, 7])).to_pylist()
    assert [row["mean"] for row in rows] == [1, 2, 3, None, 5, None, 7]
    assert [row["error_type"] for row in rows] == [None, None, None, "failed", None, "corrupt", None]
    assert rows[3]["stage"] == "decode"
    assert rows[3]["message"].startswith("RuntimeError: no JPEG (")
    assert predictor.batches == [5]
    with pytest.raises(SettingRefused):
        Predict(Decoding(), {}, ALLOTMENT)(jpegs([1, 0]))


def test_not_a_number_is_an_error_row() -> None:
    rows, _ = predicted([1, 254, 3])
    assert [row["error_type"] for row in rows] == [None, "not_finite", None]
    assert rows[1]["stage"] == "predict"


def test_a_table_without_images() -> None:
    rows, predictor = predicted([None, None])
    assert [row["mean"] for row in rows] == [None, None]
    assert predictor.batches == []


def test_a_predictor_that_returns_too_few_values_is_named() -> None:
    class Short(Mean):
        def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
            return {"mean": np.zeros(1, np.float32)}

    rows = Predict(Short(), {}, ALLOTMENT)(table([1, 2])).to_pylist()
    assert "must return 1 values of 'vector'" in rows[0]["message"]


@pytest.mark.parametrize("kind", [list, np.array, pa.array])
def test_columns_may_be_lists_numpy_or_arrow(kind: type) -> None:
    class Text(Mean):
        columns = pa.schema([("word", pa.string())])

        def predict(self, pixels: np.ndarray) -> dict:
            return {"word": kind(["a"] * len(pixels))}

    assert [row["word"] for row in Predict(Text(), {}, ALLOTMENT)(table([1, None, 3])).to_pylist()] == ["a", None, "a"]


def test_images_of_several_sizes_become_one_batch() -> None:
    class Sides(Mean):
        columns = pa.schema([("side", pa.int32()), ("first", pa.uint8())])

        def join(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [image for each in pixels for image in each]

        def predict(self, pixels: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
            self.batches.append(len(pixels))
            assert all(image.shape == (len(image), len(image), 3) for image in pixels)
            return {
                "side": np.array([len(image) for image in pixels]),
                "first": np.array([image[0, 0, 0] for image in pixels]),
            }

    given = table([0, 1, None, 3, 4, None])
    sides = [2, 4, 0, 2, 1, 0]
    arrays = [Decoded(np.full((s, s, 3), i, np.uint8), s, s) if s else None for i, s in enumerate(sides)]
    for name, column in pixels.to_columns(arrays).items():
        given = given.set_column(given.schema.get_field_index(name), name, column)
    for first in (0, 1):
        stage = Predict(predictor := Sides(), {}, ALLOTMENT)
        rows = stage(given.slice(first)).to_pylist()
        assert [row["side"] for row in rows] == [side or None for side in sides[first:]]
        assert [row["first"] for row in rows] == [i if side else None for i, side in enumerate(sides)][first:]
        assert predictor.batches == [4 - first]
