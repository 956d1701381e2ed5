"""A head gives the flags of its vectors again, and refuses those that contradict it."""

from typing import Any

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.models import input_spec
from pipeline.models.head_flags import flags_of, windows_of, with_flags_of_head
from pipeline.models.heads import Head, NamedHead

PLACE = {"input": "a", "output": "/o"}
TRANSFORM: dict[str, Any] = {
    "resize": 72, "crop": 64, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3, "squash": False,
}  # fmt: skip
NETWORK = {"model": "resnet18", "weights": "random", "seed": 3}


def settings_of(run: dict[str, Any], transform: dict[str, Any] = TRANSFORM, **more: Any) -> dict[str, Any]:
    """The settings of a run of embed with these flags."""
    network = {"model": "resnet18", "weights": "random, seed 3", "precision": "float32", "transform": transform}
    return {**RunConfig(**PLACE, **run).result_settings(), **network, **more}


def named(settings: dict[str, Any], **network: Any) -> NamedHead:
    space = EmbeddingSpace.of(settings)
    assert space is not None
    flags = {**NETWORK, **windows_of(settings), **network}
    head = Head("linear", {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, ("a", "b"), space, network=flags)
    return NamedHead("kinds", "0" * 64, head)


RUNS = [
    {},
    {"exif_rotate": False, "decoder": "exact"},
    {"tile_size": 64},
    {"tile_size": 64, "tile_stride": 32, "edge": "shift", "max_nodata": 0.5},
    {"tile_size": 256, "resolution": 10.5, "resampling": "nearest"},
    {"bands": "3,2,1", "scale": "0:3000", "nodata_fill": 12.5},
    {"bands": "red,nir", "scale": "-0.1:1e3", "harmonize": "off", "tile_size": 32},
    {"tile_size": 32, "assets": "B04,B03"},
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: " ".join(run) or "defaults")
def test_a_command_with_a_head_only_has_the_vectors_of_the_head(run: dict[str, Any]) -> None:
    settings = settings_of(run)
    flags = with_flags_of_head(named(settings), PLACE, {"head": ["kinds.safetensors"]})
    assert RunConfig(**flags.run).result_settings() == RunConfig(**PLACE, **run).result_settings()
    assert flags.network == {
        **NETWORK, "head": ["kinds.safetensors"], "precision": "float32",
        **{name: TRANSFORM[name] for name in ("resize", "crop", "interpolation", "mean", "std")},
    }  # fmt: skip
    for name, value in run.items():
        assert f"--{name.replace('_', '-')} {value}" in flags.taken or name in ("scale", "exif_rotate")


def test_a_measured_scale_is_taken_as_it_was_measured() -> None:
    config = RunConfig(**PLACE, scale="percentile:2:98").with_measured_scale(5.0, 301.5)
    measured = {**settings_of({}), **config.value_settings()}
    head = named(measured)
    assert flags_of(head)["scale"] == "5.0:301.5"
    assert head.head.space == EmbeddingSpace.of(settings_of({"scale": "5:301.5"}))
    with pytest.raises(WeightsRefused, match=r"scale is percentile:2:98, not \[5\.0, 301\.5\]"):
        with_flags_of_head(head, {**PLACE, "scale": "percentile:2:98"}, {})


@pytest.mark.parametrize(
    ("run", "network", "message"),
    [
        ({"tile_size": 32}, {}, "tiling.size is 32, not 64"),
        ({"resolution": 20.0}, {}, "tiling.resolution is 20.0, not 10.0"),
        ({"resampling": "nearest"}, {}, "tiling.resampling is nearest, but was not set"),
        ({"scale": "0:255"}, {}, r"scale is \[0.0, 255.0\], not \[0.0, 3000.0\]"),
        ({"bands": "1,2,3"}, {}, r'bands is \["1", "2", "3"\], but was not set'),
        ({"harmonize": "off"}, {}, "harmonize is off, but was not set"),
        ({"decoder": "exact"}, {}, "decoder is exact, not fast"),
        ({"nodata_fill": 7.0}, {}, "nodata_fill is 7.0, but was not set"),
        ({"scale": "percentile:1:99"}, {}, r"scale is percentile:1:99, not \[0.0, 3000.0\]"),
        ({}, {"model": "resnet50"}, "model is resnet50, not resnet18"),
        ({}, {"precision": "bfloat16"}, "precision is bfloat16, not float32"),
        ({}, {"crop": 72}, "transform.crop is 72, not 64"),
        ({}, {"interpolation": "nearest"}, "transform.interpolation is nearest, not bicubic"),
    ],
)
def test_a_flag_that_contradicts_the_head_is_refused_by_name(
    run: dict[str, Any], network: dict[str, Any], message: str
) -> None:
    head = named(settings_of({"tile_size": 64, "resolution": 10.0, "scale": "0:3000"}))
    with pytest.raises(WeightsRefused, match=rf"--head kinds was fitted on other vectors .* this command: {message};"):
        with_flags_of_head(head, {**PLACE, **run}, network)


def test_flags_of_the_same_value_and_other_windows_are_no_contradiction() -> None:
    head = named(settings_of({"tile_size": 64, "tile_stride": 32, "scale": "0:3000"}))
    given = {**PLACE, "tile_size": 64, "scale": "0.0:3e3", "tile_stride": 16, "limit": 5, "zoom": "3"}
    flags = with_flags_of_head(head, given, {"model": "resnet18", "crop": 64, "weights": "/moved.pt"})
    assert flags.run["tile_stride"] == 16
    assert flags.network["weights"] == "/moved.pt"
    assert "tile" not in flags.taken
    assert "--resize 72" in flags.taken


def of_specification(name: str, file: str | None = None, **changed: Any) -> NamedHead:
    loaded = input_spec.load(name)
    of_transform = ("resize", "crop", "interpolation", "mean", "std", "squash")
    transform = {each: getattr(loaded.transform, each) for each in of_transform} | changed
    settings = settings_of({"tile_size": 64}, transform, specification=loaded.settings())
    return named(settings, input_spec=file or name)


@pytest.mark.parametrize("name", input_spec.shipped())
def test_an_input_specification_gives_its_own_transform(name: str) -> None:
    flags = flags_of(of_specification(name))
    assert flags["input_spec"] == name
    assert not {"resize", "crop", "interpolation", "mean", "std"} & set(flags)
    assert flags_of(of_specification(name, crop=32))["crop"] == 32


def test_a_specification_that_is_gone_is_refused_with_the_remedy() -> None:
    head = of_specification("sentinel2-rgb", "/gone/mine.yaml")
    with pytest.raises(SettingRefused, match=r"--head kinds names it: give its present place with --input-spec"):
        flags_of(head)
    assert "mean" not in flags_of(head, "sentinel2-rgb")


def test_a_head_cannot_set_other_flags() -> None:
    """A file from elsewhere must not remove an output."""
    head = named(settings_of({}), overwrite=True, output="/elsewhere", input="/b", max_error_rate=1.0)
    flags = with_flags_of_head(head, PLACE, {})
    assert flags.run["output"] == "/o"
    assert not {"overwrite", "max_error_rate"} & {*flags.run, *flags.network}
