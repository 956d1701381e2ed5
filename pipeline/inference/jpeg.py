"""Encoded JPEGs → uint8 pixels of the network's size, on the network's device.

torchvision decodes them, with nvJPEG on a GPU and libjpeg on a CPU. torch then rotates, resizes and crops them. The
pixels differ slightly from those of `pipeline.images.decode`: nvJPEG repeats chroma samples and libjpeg interpolates
them; resizing rounds once here and twice in Pillow.
"""

import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pipeline.errors import DecodeError, SettingRefused, is_out_of_memory, message_line
from pipeline.halving import by_halves
from pipeline.images.decode import decode
from pipeline.images.pixels import RGB8, Encoded
from pipeline.images.resize import scaled_sizes
from pipeline.images.transform import Transform
from pipeline.inference.cuda_stream import synchronize
from pipeline.models.lazy_torchvision import torchvision

log = logging.getLogger(__name__)

DECODED_BYTES = 64 << 20
"""Limit on the pixels that are decoded at a time: about 120 photos of 470 × 400. A larger image is decoded alone."""

ROTATIONS: dict[int, tuple[bool, tuple[int, ...]]] = {
    1: (False, ()),
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}
"""EXIF 2.32, tag 0x0112 → whether to transpose [..., height, width], and the dimensions to flip afterwards."""

PROBE_COLOURS = {"RGB": (200, 60, 30), "L": (120,) * 3}
"""Mode and colour of the images that test a device."""
PROBE_TOLERANCE = 6
"""Largest difference of the mean colour, in levels of 0 to 255."""

# Filters of the whole process. The bytes of an Arrow table are read-only, and nothing here writes to them. torchvision
# deprecates decode_jpeg in favour of TorchCodec.
warnings.filterwarnings("ignore", message="The given buffer is not writable")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torchvision\.io")


class JpegDecoder:
    """Decodes JPEGs on one device; an image that the device cannot decode is decoded on the CPU. Thread-safe."""

    def __init__(self, transform: Transform, device: torch.device) -> None:
        """Raises SettingRefused if torchvision cannot decode on this device, or decodes wrong colours."""
        self.transform, self.device = transform, device
        self.thread = threading.local()
        try:
            with self._thread_stream():
                self._probe()
        except Exception as error:  # this torchvision has no nvJPEG, or it does not work here
            no_memory = is_out_of_memory(error)
            remedy = "end other processes that use its memory" if no_memory else "install a torchvision with CUDA"
            raise SettingRefused(
                f"--decoder gpu: torchvision {version('torchvision')} cannot decode JPEGs on {device}: "
                f"{message_line(error)}; {remedy}, or use --decoder fast"
            ) from error

    def __call__(self, jpegs: Sequence[Encoded]) -> tuple[Tensor, dict[int, DecodeError]]:
        """Decode N JPEGs.

        Returns uint8 [M, crop, crop, 3] on the device, the M good images in order, and the errors of the other N - M
        images by index.
        """
        with self._thread_stream():
            pixels, errors = self._decode_all(jpegs)
        if self.device.type == "cuda":
            pixels.record_stream(torch.cuda.current_stream(self.device))
        return pixels, errors

    @contextmanager
    def _thread_stream(self) -> Iterator[None]:
        """Make a stream of this thread current on a GPU; afterwards the caller's stream waits for it.

        torch reuses freed memory within a stream at once, and nvJPEG ignores streams. With a shared stream it could
        write to memory that kernels of another thread still read.
        """
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self.thread, "stream"):
            self.thread.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.thread.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.thread.stream)

    def _decode_all(self, jpegs: Sequence[Encoded]) -> tuple[Tensor, dict[int, DecodeError]]:
        pixels = torch.empty((len(jpegs), *RGB8.shape(self.transform)), dtype=torch.uint8, device=self.device)
        errors: dict[int, DecodeError] = {}
        with torch.no_grad():
            failed = [index for piece in _pieces(jpegs) for index in self._fill(pixels, jpegs, piece)]
        for index in failed:
            try:
                pixels[index] = torch.tensor(_decode_on_cpu(jpegs[index], self.transform), device=self.device)
            except DecodeError as error:
                errors[index] = error
        if errors:
            pixels = pixels[[index for index in range(len(jpegs)) if index not in errors]]
        return pixels, errors

    def _fill(self, pixels: Tensor, jpegs: Sequence[Encoded], piece: range) -> list[int]:
        """Decode the JPEGs of a piece into `pixels`; return the indices of those that the device cannot decode.

        One bad image makes the device fail for all images of a call, so a failing call is halved.
        """

        def run(part: range) -> bool:
            pixels[part.start : part.stop] = self._decode(jpegs[part.start : part.stop])
            return True

        def alone(error: Exception) -> bool:
            if not isinstance(error, RuntimeError):  # raised by nvJPEG and libjpeg, and if memory is full
                raise error
            log.debug("the device cannot decode a JPEG, so the CPU does: %s", error)
            return False

        failed, first = [], piece.start
        for size, is_decoded in by_halves(piece, run, alone):
            if not is_decoded:
                failed.append(first)
            first += size
        return failed

    def _decode(self, jpegs: Sequence[Encoded]) -> Tensor:
        """Decode on the device: uint8 [N, crop, crop, 3]. Raises RuntimeError if it cannot decode one of them."""
        encoded = [torch.frombuffer(jpeg.data, dtype=torch.uint8) for jpeg in jpegs]
        synchronize(self.device)  # nvJPEG ignores streams: it would overwrite the previous images while they are read
        images = torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB, device=self.device)
        same_size: dict[tuple[int, int, int], list[int]] = {}
        for index, (jpeg, image) in enumerate(zip(jpegs, images, strict=True)):
            if image.shape != (3, jpeg.height, jpeg.width):
                raise RuntimeError(f"a JPEG of {jpeg.width} × {jpeg.height} was decoded to {tuple(image.shape)}")
            same_size.setdefault((jpeg.width, jpeg.height, jpeg.orientation), []).append(index)
        cropped = torch.empty((len(jpegs), *RGB8.shape(self.transform)), device=self.device)
        for (_, _, orientation), indices in same_size.items():
            if len(indices) == 1:  # faster without stack and scatter; photos have many different sizes
                image = rotate(images[indices[0]][None], orientation)
                cropped[indices[0]] = resize_crop(image, self.transform)[0]
            else:
                stacked = torch.stack([images[index] for index in indices])
                cropped[indices] = resize_crop(rotate(stacked, orientation), self.transform)
        return cropped.round_().clamp_(0, 255).to(torch.uint8)

    def _probe(self) -> None:
        """Decode one colour and one grey image; raise RuntimeError if their colours differ."""
        for mode, colour in PROBE_COLOURS.items():
            file = io.BytesIO()
            Image.new(mode, (32, 32), colour if mode == "RGB" else colour[0]).save(file, "JPEG", quality=95)
            mean = self._decode([Encoded(file.getvalue(), 32, 32, 1)]).float().mean((0, 1, 2)).cpu()
            if (mean - torch.tensor(colour)).abs().max() > PROBE_TOLERANCE:
                raise RuntimeError(f"an image of {mode} {colour} was decoded to {mean.round().tolist()}")


def rotate(images: Tensor, orientation: int) -> Tensor:
    """Turn images [N, 3, H, W] upright. orientation: EXIF, 1 to 8; 5 to 8 swap H and W."""
    transpose, flipped = ROTATIONS[orientation]
    images = images.transpose(-2, -1) if transpose else images
    return images.flip(flipped) if flipped else images


def resize_crop(images: Tensor, transform: Transform) -> Tensor:
    """uint8 [N, 3, H, W] → float32 [N, crop, crop, 3], not rounded: torchvision's evaluation transform.

    transform.resize must be at least transform.crop.
    """
    (width, height), (left, top) = scaled_sizes(images.shape[-1], images.shape[-2], transform)
    x = functional.interpolate(
        images.float(), size=(height, width), mode=transform.interpolation, align_corners=False, antialias=True
    )
    return x[..., top : top + transform.crop, left : left + transform.crop].permute(0, 2, 3, 1)


def _decode_on_cpu(jpeg: Encoded, transform: Transform) -> np.ndarray:
    """Decode as the loader does: uint8 [crop, crop, 3]. The loader has checked the size. Raises DecodeError."""
    exif_rotate = jpeg.orientation != 1
    return decode(bytes(jpeg.data), transform, max_pixels=sys.maxsize, exif_rotate=exif_rotate, exact=False).pixels


def _pieces(jpegs: Sequence[Encoded]) -> Iterator[range]:
    """Split indices of JPEGs into ranges of at most DECODED_BYTES of pixels, or of one larger image."""
    start = decoded_bytes = 0
    for index, jpeg in enumerate(jpegs):
        size = jpeg.width * jpeg.height * 3
        if index > start and decoded_bytes + size > DECODED_BYTES:
            yield range(start, index)
            start, decoded_bytes = index, 0
        decoded_bytes += size
    if jpegs:
        yield range(start, len(jpegs))
