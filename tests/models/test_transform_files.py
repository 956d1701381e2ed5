"""The transform of weights: --transform, metadata of the file, config.json beside it, and which of them counts."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from networks import SMALL, draw_input, save, small, trained
from safetensors.torch import save_file

from pipeline.config import RunConfig
from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.images.transform import IMAGENET_MEAN, IMAGENET_STD, Transform
from pipeline.models import transform_files
from pipeline.models.overrides import Overrides
from pipeline.models.spec import build, resolve
from pipeline.predictors.embed import Embedder
from pipeline.stages.load import check_settings

pytestmark = pytest.mark.usefixtures("own_caches")

OWN = {"resize": 40, "crop": 32, "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.2], "squash": True}
AS_TRANSFORM = Transform(40, 32, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), True)


def write_yaml(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def write_safetensors(path: Path, transform: object) -> str:
    """A file of `small` with metadata."""
    save_file(small().state_dict(), path, {"nightshift": json.dumps({"model": "networks:small", **transform})})  # type: ignore[dict-item]
    return str(path)


def transform_of(weights: str = "random", **values: object) -> Transform:
    embedder = Embedder(model="networks:small", weights=weights, **values)  # type: ignore[arg-type]
    embedder.prepare()
    assert embedder.transform == embedder.spec.transform
    return embedder.transform


# --transform


def test_a_file_of_all_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_yaml(tmp_path / "t.yaml", json.dumps(OWN))
    assert transform_of(transform_=file) == AS_TRANSFORM
    (note,) = caplog.messages
    assert "the run uses --resize 40 --crop 32 --interpolation bicubic --mean 0.5,0.4,0.3 --std 0.2,0.2,0.2" in note
    assert (
        f"and ignores the aspect ratio (resize, crop, interpolation, mean, std, squash from --transform {file})" in note
    )


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("range: [0, 255]\nmean: [123.675, 116.28, 103.53]\nstd: [58.395, 57.12, 57.375]", IMAGENET_MEAN, IMAGENET_STD),
        ("range: [0, 255]\nmean: 0\nstd: 1", (0.0,) * 3, (1 / 255,) * 3),
        ("range: [-1, 1]\nmean: 0\nstd: 1", (0.5,) * 3, (0.5,) * 3),
        ("range: [0, 1]\nmean: 0.5\nstd: 0.25", (0.5,) * 3, (0.25,) * 3),
    ],
)
def test_mean_and_std_are_in_units_of_the_range(
    text: str, mean: tuple[float, ...], std: tuple[float, ...], tmp_path: Path
) -> None:
    transform = transform_of(transform_=write_yaml(tmp_path / "t.yaml", text))
    assert transform.mean == pytest.approx(mean)
    assert transform.std == pytest.approx(std)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resise: 3", r"t\.yaml: the key 'resise' is unknown; did you mean resize\?"),
        ("colour: 3", r"the keys are resize, crop, interpolation, mean, std, squash, range, scale"),
        ("- 1", "must have one key per line"),
        ("a: [", "cannot be read"),
        ("crop: 32\ncrop: 64", "cannot be read: line 2: the key crop is given twice"),
        ("resize: 2.5", "resize is 2.5, but it must be a whole number"),
        ("resize: 0", r"t\.yaml: resize is 0: it must be a number of pixels from 1 to 4096"),
        ("resize: 100", "the crop of 224 pixels is larger than the resized image of 100"),
        ("interpolation: cubic", r"t\.yaml: interpolation is 'cubic': it must be one of nearest"),
        ("mean: [123.675, 116.28, 103.53]", r"mean is 123.675,116.28,103.53: .*or state `range: \[0, 255\]`"),
        ("mean: [0.5, 0.5]", r"mean of --transform .*t\.yaml is 0.5,0.5, which are 2 numbers"),
        ("mean: blue", "mean is 'blue', but it must be one number, or a list"),
        ("std: 0", "std is 0: it must be numbers from 1e-06 to 1"),
        ("range: [0, 255]", "range is .*, which needs mean and std beside it"),
        ("range: [1, 0]\nmean: 0\nstd: 1", "the lower one first"),
        ("squash: 1", "squash is 1, but it must be true or false"),
        ("scale: 3000", "scale is 3000, but it must be two numbers"),
    ],
)
def test_a_bad_file_is_refused_with_key_value_and_remedy(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match=message):
        transform_of(transform_=write_yaml(tmp_path / "t.yaml", text))


def test_other_refusals(tmp_path: Path) -> None:
    for name, message in (("none.yaml", "cannot be read"), ("t.txt", "must be a file that ends in .yaml")):
        with pytest.raises(SettingRefused, match=message):
            Embedder(model=SMALL, transform_=str(tmp_path / name))
    file = write_yaml(tmp_path / "t.yaml", "resize: 32")
    with pytest.raises(SettingRefused, match="--transform contradicts --input-spec sentinel2-rgb"):
        Embedder(model=SMALL, transform_=file, input_spec="sentinel2-rgb")


# Metadata of the file


def test_the_order_of_precedence(tmp_path: Path) -> None:
    weights = write_safetensors(tmp_path / "w.safetensors", {"transform": OWN})
    assert transform_of(weights) == AS_TRANSFORM
    file = write_yaml(tmp_path / "t.yaml", "crop: 36\nmean: 0.25\nsquash: false")
    embedder = Embedder(model="networks:small", weights=weights, transform_=file, crop=24)
    embedder.prepare()
    assert embedder.transform == Transform(40, 24, "bicubic", (0.25,) * 3, (0.2,) * 3, False)
    metadata = f"metadata of --weights {weights}"
    assert embedder.provenance()["transform_from"] == {
        "resize": metadata,
        "crop": "flags",
        "interpolation": metadata,
        "mean": f"--transform {file}",
        "std": metadata,
        "squash": f"--transform {file}",
    }
    assert "transform_from" not in embedder.settings(), "where a value comes from does not change results"


def test_a_network_is_built_for_the_crop_of_its_file(tmp_path: Path) -> None:
    network = torchvision.models.VisionTransformer(64, 32, 1, 12, 768, 16)
    state = torchvision.models.vit_b_32(image_size=64).state_dict()
    del network
    metadata = {"nightshift": json.dumps({"transform": {"resize": 64, "crop": 64}})}
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "v.safetensors", metadata)
    spec = resolve("vit_b_32", str(tmp_path / "v.safetensors"))
    assert (spec.transform.crop, spec.origins["mean"].split(";")[0]) == (64, "default of --model vit_b_32")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("not JSON", "entry 'nightshift' is not JSON"),
        ('{"transform": 3}', "transform is 3: it must be an object"),
        ('{"transform": {"rotate": 3}}', r"metadata of --weights .*: the key 'rotate' is unknown"),
    ],
)
def test_metadata_that_are_not_understood_are_refused(metadata: str, message: str, tmp_path: Path) -> None:
    save_file(small().state_dict(), tmp_path / "w.safetensors", {"nightshift": metadata})
    with pytest.raises(WeightsRefused, match=message):
        resolve("networks:small", str(tmp_path / "w.safetensors"))


def test_metadata_without_a_transform_state_none(tmp_path: Path) -> None:
    assert transform_of(write_safetensors(tmp_path / "w.safetensors", {"classes": ["a"]})) == Transform()


def test_the_scale_of_the_training_is_demanded(tmp_path: Path) -> None:
    weights = write_safetensors(tmp_path / "w.safetensors", {"transform": {**OWN, "scale": [0, 3000]}})
    embedder = Embedder(model="networks:small", weights=weights)
    embedder.prepare()
    for scale in (None, "0:255", "percentile:2:98"):
        with pytest.raises(SettingRefused, match="trained with 0:3000: set it to that"):
            check_settings(RunConfig(input="a", output="b", scale=scale), embedder)
    check_settings(RunConfig(input="a", output="b", scale="0:3000"), embedder)


# timm's config.json


def hub_folder(folder: Path, **changes: object) -> Path:
    """A folder as timm pushes it to the Hugging Face hub, without the weights."""
    folder.mkdir()
    config = {"input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 0.8, "crop_mode": "center"}
    config |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], **changes}
    record = {"architecture": SMALL, "num_classes": 7, "label_names": list("abcdefg"), "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_folder_of_hugging_face_states_transform_and_classes(tmp_path: Path, web_server: str) -> None:
    network = trained()
    folder = hub_folder(tmp_path / "hub")
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    save_file(network.state_dict(), folder / "model.safetensors")
    for weights in (str(folder / "pytorch_model.bin"), str(folder / "model.safetensors")):
        spec = resolve(SMALL, weights)
        assert spec.transform == Transform(80, 64, "bicubic", (0.5,) * 3, (0.5,) * 3)
        assert (spec.labels, spec.origins["crop"]) == (tuple("abcdefg"), f"config.json beside --weights {weights}")
        with torch.no_grad():
            torch.testing.assert_close(build(spec)(draw_input())[1], network(draw_input()))
    of_web = resolve(SMALL, f"{web_server}/hub/model.safetensors?token=x")
    assert (of_web.transform, of_web.labels) == (spec.transform, spec.labels)
    assert "token" not in json.dumps(dict(of_web.origins))
    (folder / "config.json").unlink()
    assert resolve(SMALL, f"{web_server}/hub/model.safetensors").transform.crop == 224


def test_a_timm_network_with_its_weights_from_a_hub_folder(tmp_path: Path) -> None:
    network = timm.create_model("resnet10t", num_classes=7).eval()
    folder = hub_folder(tmp_path / "hub", crop_pct=1.0, crop_mode="squash", mean=None)
    save_file(network.state_dict(), folder / "model.safetensors")
    spec = resolve("timm:resnet10t", str(folder / "model.safetensors"))
    assert spec.transform == Transform(64, 64, "bicubic", IMAGENET_MEAN, (0.5,) * 3, True)
    with torch.no_grad():
        torch.testing.assert_close(build(spec)(draw_input())[1], network(draw_input()))


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet10t", "vit_tiny_patch16_224", "efficientnet_lite0", "resnet50.tv_in1k"]
)
def test_the_transform_is_that_of_timm(name: str) -> None:
    config = timm.get_pretrained_cfg(name).to_dict()
    expected = timm.data.resolve_data_config({}, pretrained_cfg=config)
    transform = transform_files.transform_of_timm(config)
    assert (3, transform.crop, transform.crop) == tuple(expected["input_size"])
    assert (transform.mean, transform.std) == (tuple(expected["mean"]), tuple(expected["std"]))
    assert transform.resize == int(expected["input_size"][1] / expected["crop_pct"])
    assert transform.interpolation == expected["interpolation"]


def test_what_a_config_may_hold(tmp_path: Path) -> None:
    flat = {"architecture": "resnet18", "input_size": [3, 32, 32], "crop_pct": 1.0}
    stated = transform_files.of_config(json.dumps(flat).encode(), "w").transform
    assert stated.given == {"resize": 32, "crop": 32, "interpolation": "bicubic", "mean": IMAGENET_MEAN,
                            "std": IMAGENET_STD, "squash": False}  # fmt: skip
    for other in ({"model_type": "resnet"}, [1], {"pretrained_cfg": None}):
        assert transform_files.of_config(json.dumps(other).encode(), "w").transform == Overrides()
    for text, message in [
        ("{", "is not JSON"),
        ('{"input_size": [3, 32, 64]}', "32 × 64 pixels, but only square .*state the transform with --transform"),
        ('{"input_size": [3, 32, 32], "crop_mode": "border"}', "needs crop_mode 'border'"),
        ('{"input_size": 32}', "config.json beside --weights w: "),
    ]:
        with pytest.raises(WeightsRefused, match=message):
            transform_files.of_config(text.encode(), "w")


# Checkpoints of training scripts


def test_a_whole_checkpoint_of_lightning_and_numpy_scalars_load(tmp_path: Path) -> None:
    import numpy as np

    state = {f"net.{name}": value for name, value in small().state_dict().items()}
    content = {"epoch": 3, "global_step": 10, "pytorch-lightning_version": "2.5", "state_dict": state,
               "hyper_parameters": {"lr": 0.1}, "best": np.float64(0.9), "seen": np.int64(3)}  # fmt: skip
    path = save(tmp_path / "epoch=3.ckpt", content)
    assert resolve("networks:small", path).num_classes == 6
