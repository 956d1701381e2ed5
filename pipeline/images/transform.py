"""The resize, crop and normalization of images. Imports nothing from Nightshift."""

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Transform:
    """torchvision's evaluation transform: resize, centre crop, normalize.

    The short side is resized to `resize` pixels with antialiasing, then the centre `crop` × `crop` pixels are cut out.
    Both steps run on uint8, in the process that decodes the image. The network's device then computes
    `(pixel / 255 - mean) / std`.

    squash: resize both sides to `resize` and ignore the aspect ratio.

    With an input specification, `resize` 0 keeps the image's own size, and `mean` and `std` are the specification's.
    """

    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"  # nearest, bilinear, bicubic, lanczos
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    squash: bool = False
