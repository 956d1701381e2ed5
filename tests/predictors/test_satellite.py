"""Networks for satellite imagery: the embedding of a GeoTIFF against plain timm and torch."""

from pathlib import Path

import images
import numpy as np
import pytest
import torch
from PIL import Image
from satellite import OLD_PRODUCT, PRODUCT, SENTINEL2, checkpoint, draw_dn, features, geotiff
from torch import Tensor, nn
from torchvision.transforms import v2

from pipeline.config import RunConfig
from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.images.decode import decode
from pipeline.images.transform import IMAGENET_MEAN, IMAGENET_STD
from pipeline.models import input_spec
from pipeline.output.run_record import RunRecord
from pipeline.predictors.classify import Classifier
from pipeline.predictors.embed import Embedder
from pipeline.sources import ReadOptions
from pipeline.stages.load import Loader

pytestmark = pytest.mark.usefixtures("own_caches")

SOFTCON_MEAN = [1612.9, 1397.6, 1322.3, 1373.1, 1561.0, 2108.4, 2390.7, 2318.7, 2581.0, 837.7, 22.0, 2195.2, 1537.4]
SOFTCON_STD = [791.0, 854.3, 878.7, 1144.9, 1127.5, 1164.2, 1276.0, 1249.5, 1345.9, 577.5, 47.5, 1340.0, 1142.9]


def ssl4eo_s12(mean: list[float], std: list[float]) -> nn.Sequential:
    return nn.Sequential(v2.Resize((256, 256)), v2.CenterCrop(224), v2.Normalize(mean, std))


def seco(low: list[float], high: list[float]) -> nn.Sequential:
    stretch = v2.Normalize(low, [b - a for a, b in zip(low, high, strict=True)])
    colours = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    clamp = v2.Lambda(lambda x: x.clamp(0, 1), Tensor)
    return nn.Sequential(
        v2.Resize((256, 256)), v2.CenterCrop(224), v2.Normalize([0], [10000 / 255]), stretch, clamp, colours
    )


def satlas_ms() -> nn.Sequential:
    scale = v2.Normalize([0] * 9, [255.0] * 3 + [8160.0] * 6)
    return nn.Sequential(v2.CenterCrop(256), scale, v2.Lambda(lambda x: x.clamp(0, 1), Tensor))


LANDSAT = nn.Sequential(v2.CenterCrop((224, 224)), v2.Normalize([0], [255]))
TEN_THOUSAND = ssl4eo_s12([0], [10000])
TRANSFORMS: dict[str, tuple[nn.Sequential, int, float]] = {
    "sentinel2-all": (TEN_THOUSAND, 264, 5000),
    "sentinel2-all-softcon": (ssl4eo_s12(SOFTCON_MEAN, SOFTCON_STD), 120, 5000),
    "sentinel2-all-seco-eco": (nn.Sequential(v2.Resize((224, 224)), v2.Normalize([0.0], [10000.0])), 500, 5000),
    "sentinel2-rgb": (TEN_THOUSAND, 600, 5000),
    "sentinel2-rgb-seco": (seco([0, 2, 3], [129, 103, 88]), 264, 5000),
    "sentinel2-satlas-ms": (satlas_ms(), 270, 9000),
    "sentinel1-grd": (ssl4eo_s12([-12.59, -20.26], [5.26, 5.91]), 264, -5),
    "landsat-tm-toa": (LANDSAT, 264, 250),
    "landsat-etm-toa": (LANDSAT, 264, 250),
    "landsat-etm-sr": (LANDSAT, 264, 250),
    "landsat-oli-tirs-toa": (LANDSAT, 264, 250),
    "landsat-oli-sr": (LANDSAT, 264, 250),
}
"""Specification → TorchGeo's transform, written again, the side of the image, and its largest number."""


def stored(name: str, bands: int) -> np.ndarray:
    _, side, high = TRANSFORMS[name]
    if high < 0:
        return (draw_dn(bands, side).astype(np.float32) / 250 - 30).astype(np.float32)
    return draw_dn(bands, side, high=int(high), low=3).astype(np.uint8 if high < 256 else np.uint16)


def embedded(predictor: Embedder, data: bytes, name: str = "a.tif", **settings: object) -> np.ndarray:
    """The embedding of an image, decoded by the loader of a run."""
    config = RunConfig(input="a", output="o", **settings)  # type: ignore[arg-type]
    loader = Loader.of(config, predictor, ReadOptions(), rows_per_table=1)
    decoded = decode(data, loader.transform, values=loader.values, offset_of=loader.offset_of(name))
    return np.asarray(predictor.predict(decoded.pixels[None])["embedding"])[0]


def prepared(name: str, weights: Path, model: str = "timm:resnet18") -> Embedder:
    predictor = Embedder(model=model, weights=str(weights), input_spec=name, precision="float32")
    predictor.prepare()
    return predictor


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_embedding_is_that_of_timm_behind_torchgeos_transform(name: str, tmp_path: Path) -> None:
    specification = input_spec.load(name)
    array = stored(name, len(specification.bands))
    network = checkpoint(tmp_path / "w.pth", len(array))
    backwards = geotiff(array[::-1], specification.band_names[::-1])
    mine = embedded(
        prepared(name, tmp_path / "w.pth"), backwards, harmonize="off" if specification.harmonize else "auto"
    )
    expected = features(network, TRANSFORMS[name][0](torch.from_numpy(array.astype(np.float32))))
    np.testing.assert_allclose(mine, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 1e-3


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("satlas-rgb", nn.Sequential(v2.CenterCrop(256), v2.Normalize([0], [255]))),
        ("fmow-rgb-gassl", nn.Sequential(v2.Normalize([0], [255]), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD))),
    ],
)
def test_networks_for_pictures_take_pictures(name: str, transform: nn.Sequential, tmp_path: Path) -> None:
    """A PNG and a GeoTIFF with the same colours. Of another size than 224 a picture is resized in 8 bits."""
    side = 270 if name == "satlas-rgb" else 224
    array = draw_dn(4, side, high=250, low=3).astype(np.uint8)
    network = checkpoint(tmp_path / "w.pth", 3)
    predictor = prepared(name, tmp_path / "w.pth")
    expected = features(network, transform(torch.from_numpy(array[:3].astype(np.float32))))
    picture = images.encode(Image.fromarray(np.moveaxis(array[:3], 0, 2)), "PNG")
    tile = geotiff(array[::-1], ["nir", "blue", "green", "red"])
    for data in (picture, tile):
        np.testing.assert_allclose(embedded(predictor, data), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["resnet50", "timm:resnet50"])
def test_torchvisions_and_timms_networks_take_the_same_keys(model: str, tmp_path: Path) -> None:
    array = draw_dn(side=264)
    network = checkpoint(tmp_path / "w.pth", 13, "resnet50")
    mine = embedded(prepared("sentinel2-all", tmp_path / "w.pth", model), geotiff(array, SENTINEL2), harmonize="off")
    expected = features(network, TEN_THOUSAND(torch.from_numpy(array.astype(np.float32))))
    np.testing.assert_allclose(mine, expected, atol=1e-4, rtol=1e-4)


def test_the_offset_is_subtracted_by_the_name_of_the_product(tmp_path: Path) -> None:
    array = draw_dn(side=64, low=100)
    array[:, :8, :8] = 0  # no data
    with_offset = np.where(array == 0, 0, array + 1000).astype(np.uint16)
    checkpoint(tmp_path / "w.pth", 13)
    predictor = prepared("sentinel2-all", tmp_path / "w.pth")
    expected = embedded(predictor, geotiff(array, SENTINEL2), f"{OLD_PRODUCT}/a.tif")
    mine = embedded(predictor, geotiff(with_offset, SENTINEL2), f"{PRODUCT}/a.tif")
    np.testing.assert_allclose(mine, expected, atol=1e-5)
    tagged = geotiff(with_offset, SENTINEL2, tags={"PROCESSING_BASELINE": "05.11"})
    np.testing.assert_allclose(embedded(predictor, tagged), expected, atol=1e-5)
    ignored = embedded(predictor, geotiff(with_offset, SENTINEL2), f"{PRODUCT}/a.tif", harmonize="off")
    assert np.abs(ignored - expected).max() > 1e-3


def test_random_weights_take_the_bands_of_the_specification() -> None:
    for model in ("resnet18", "timm:resnet18"):
        predictor = Embedder(model=model, weights="random", input_spec="landsat-tm-toa", precision="float32")
        predictor.prepare()
        assert predictor.spec.in_channels == 7
        assert str(predictor.pixel_format) == "7 × float32"
        assert not predictor.takes_tiles
        assert not predictor.takes_encoded


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    network = checkpoint(tmp_path / "w.pth", 13, with_head=True)
    predictor = Classifier(
        model="timm:resnet18", weights=str(tmp_path / "w.pth"), input_spec="sentinel2-all", precision="float32"
    )
    predictor.prepare()
    x = torch.from_numpy(draw_dn(side=224).astype(np.float32))
    with torch.no_grad():
        expected = network((x / 10000)[None]).softmax(1).max()
    columns = predictor.predict(np.moveaxis(x.numpy(), 0, 2)[None])
    assert columns["score"][0] == pytest.approx(float(expected), rel=1e-3)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "w.pth", 13)
    weights = str(tmp_path / "w.pth")
    with pytest.raises(
        WeightsRefused, match=r"takes 13 channels, but --input-spec landsat-tm-toa has 7 bands \(B1, B2"
    ):
        prepared("landsat-tm-toa", tmp_path / "w.pth")
    with pytest.raises(WeightsRefused, match=r"takes 13 channels, .* with --input-spec"):
        Embedder(model="timm:resnet18", weights=weights).prepare()
    with pytest.raises(WeightsRefused, match=r"2 missing \(fc\.bias, fc\.weight\)"):
        Classifier(model="timm:resnet18", weights=weights, input_spec="sentinel2-all").prepare()
    with pytest.raises(SettingRefused, match="--mean and --std contradict --input-spec sentinel2-all"):
        Embedder(model="timm:resnet18", weights=weights, input_spec="sentinel2-all", mean="0.5")


def test_flags_of_the_transform_override_the_specification() -> None:
    predictor = Embedder(model="resnet18", weights="random", input_spec="sentinel2-all", resize=128, crop=112)
    predictor.prepare()
    assert (predictor.transform.resize, predictor.transform.crop, predictor.transform.squash) == (128, 112, True)


def test_the_fingerprint_has_the_numbers_and_not_the_name(tmp_path: Path) -> None:
    def fingerprint(path: str) -> str:
        predictor = Embedder(model="resnet18", weights="random", input_spec=path)
        predictor.prepare()
        record = RunRecord.of(RunConfig(input="a", output="o"), predictor)
        assert record.provenance["input_spec"] == path
        return record.fingerprint

    text = (input_spec.FOLDER / "sentinel2-all.yaml").read_text()
    (tmp_path / "same.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text(text.replace("divisor: 10000", "divisor: 8160"))
    assert fingerprint("sentinel2-all") == fingerprint(str(tmp_path / "same.yaml"))
    assert fingerprint("sentinel2-all") != fingerprint(str(tmp_path / "other.yaml"))
