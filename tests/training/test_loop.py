"""The parts of the training loop: random changes, batches, learning rates."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.models.spec import build, build_for, resolve, trainable
from pipeline.training.augment import AUGMENTATIONS, Batches, Crops, centres
from pipeline.training.loop import by_depth, rate_factor

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), np.uint8)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_an_image_changes_with_the_epoch_and_with_nothing_else(kind: str) -> None:
    crops = Crops(PIXELS, kind, 32, seed=3)
    torch.manual_seed(5)
    first, row = crops[1, 2]
    assert (first.shape, first.dtype, row) == ((32, 32, 3), torch.uint8, 2)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1)), "the state of other random numbers stays"
    assert torch.equal(Crops(PIXELS, kind, 32, seed=3)[1, 2][0], first)
    assert torch.equal(crops[2, 2][0], first) == (kind == "none")
    assert torch.equal(Crops(PIXELS, kind, 32, seed=4)[1, 2][0], first) == (kind == "none")


def test_aerial_crops_keep_colours_and_lie_in_all_directions() -> None:
    ramp = np.zeros((1, 40, 40, 3), np.uint8)
    ramp[..., 0] = np.arange(40) * 4
    ramp[..., 1] = 77
    crops = [Crops(ramp, "aerial", 32, 0)[epoch, 0][0].int() for epoch in range(40)]
    assert all(set(crop[..., 1].unique().tolist()) == {77} for crop in crops)
    slopes = {
        (int(torch.sign(crop[0, -1, 0] - crop[0, 0, 0])), int(torch.sign(crop[-1, 0, 0] - crop[0, 0, 0])))
        for crop in crops
    }
    assert slopes == {(1, 0), (-1, 0), (0, 1), (0, -1)}


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_other_numbers_and_bands_are_cropped(dtype: type) -> None:
    pixels = np.random.default_rng(0).uniform(0, 3000, (2, 40, 40, 13)).astype(dtype)
    for kind in AUGMENTATIONS:
        image, _ = Crops(pixels, kind, 32, 0)[0, 1]
        assert (image.shape, image.dtype) == ((32, 32, 13), torch.float32)
    assert torch.equal(centres(pixels, [1], 32)[0], torch.from_numpy(pixels[1, 4:36, 4:36].astype(np.float32)))


def test_workers_share_each_batch() -> None:
    rows = list(range(100, 123))
    shares = [Batches(rows, 8, seed=1, rank=rank, workers=3) for rank in range(3)]
    for epoch in (1, 2):
        for share in shares:
            share.epoch = epoch
        batches = list(zip(*shares, strict=True))
        assert [sum(map(len, batch)) for batch in batches] == [8, 8, 7]
        assert sorted(row for batch in batches for part in batch for _, row in part) == rows
    one, again = (Batches(rows, 8, seed=1) for _ in range(2))
    assert list(one) == list(again)
    again.epoch = 1
    assert list(one) != list(again)


@pytest.mark.parametrize("steps", [1, 2, 10, 333])
def test_the_rate_rises_and_falls(steps: int) -> None:
    factors = [rate_factor(step, steps) for step in range(steps + 1)]
    assert max(factors) == 1
    assert min(factors) >= 0
    peak = factors.index(1)
    assert peak <= 0.1 * steps + 1
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_later_layers_learn_faster() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(10)]
    groups = by_depth(parameters, 0.8)
    assert [group["lr"] for group in groups] == [0.1, 0.2, 0.4, 0.8]
    assert [each for group in groups for each in group["params"]] == parameters


def test_the_normalization_inside_of_a_network_moves_to_the_transform() -> None:
    """torchvision's own weights of GoogLeNet and Inception normalize inside; the same weights in a file do not."""
    from dataclasses import replace

    spec = resolve("googlenet", "random", need_head=False)
    own = replace(spec, own_weights=True, weights_uri="https://…", sha256="")
    moved = trainable(own)
    assert moved.transform.mean == pytest.approx((0.5, 0.5, 0.5))
    assert moved.transform.std == pytest.approx((0.5, 0.5, 0.5))
    assert trainable(spec) == spec


@pytest.mark.parametrize("model", ["resnet18", "squeezenet1_1"])
def test_a_new_classifier_leaves_the_embedding(model: str) -> None:
    from pipeline.models.record import state_of

    spec = resolve(model, "random", need_head=False)
    new = build_for(spec, 3)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features, logits = new(images)
        assert torch.allclose(features, build(spec).features(images), atol=1e-5)
    assert logits is not None
    assert torch.equal(logits, torch.zeros(2, 3)), "the classifier starts at 0"
    assert set(state_of(new, spec.head)) == set(build_names(model))


def build_names(model: str) -> list[str]:
    import torchvision

    return list(torchvision.models.get_model(model, num_classes=3).state_dict())
