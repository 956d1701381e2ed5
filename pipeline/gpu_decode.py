"""Encoded JPEGs → uint8 pixels of the network's size, on the network's device.

On a GPU nvJPEG decodes them, through torchvision; torch turns them upright, resizes and crops them. On a CPU libjpeg
does, and the rest is the same. Pixels are near those of `decode`, not the same: nvJPEG enlarges chroma by repeating it
where libjpeg interpolates, and resizing rounds once where Pillow rounds twice.
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

from pipeline.config import Transform
from pipeline.decode import Encoded, decode
from pipeline.errors import DecodeError, SettingRefused, is_out_of_memory, message_line
from pipeline.lane import finish
from pipeline.resize import scaled_sizes
from pipeline.vision import torchvision

log = logging.getLogger(__name__)

DECODED_BYTES = 64 << 20
"""Of pixels decoded at once: about 120 photos of 470 × 400, or one image if it is larger. It bounds the memory."""

TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    1: (False, ()),
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}
"""EXIF 2.32, tag 0x0112 → whether [..., height, width] is transposed, then which of the two is reversed."""

PROBE_COLOURS = {"RGB": (200, 60, 30), "L": (120,) * 3}
PROBE_TOLERANCE = 6

# Settings of the whole process: the bytes of an Arrow table are read-only, and nothing here writes to them. torchvision
# names TorchCodec as what comes after decode_jpeg.
warnings.filterwarnings("ignore", message="The given buffer is not writable")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torchvision\.io")


class JpegDecoder:
    """Decodes JPEGs on one device. An image that the device does not decode goes to the CPU, alone."""

    def __init__(self, transform: Transform, device: torch.device) -> None:
        """Raises SettingRefused where torchvision decodes nothing, or other colours, on this device."""
        self.transform, self.device = transform, device
        self.own = threading.local()
        try:
            with self._own_stream():
                self._probe()
        except Exception as error:  # no nvJPEG in this torchvision, or none that works here
            full = is_out_of_memory(error)
            mend = "end what has taken its memory" if full else "install a torchvision that is built with CUDA"
            raise SettingRefused(
                f"--decoder gpu: torchvision {version('torchvision')} decodes no JPEG on {device}: "
                f"{message_line(error)}; {mend}, or take --decoder fast"
            ) from error

    def __call__(self, jpegs: Sequence[Encoded]) -> tuple[Tensor, dict[int, DecodeError]]:
        """uint8 [M, crop, crop, 3] on the device, of those that are images, in order; and the errors of the others by
        their places."""
        with self._own_stream():
            pixels, errors = self._all(jpegs)
        if self.device.type == "cuda":
            pixels.record_stream(torch.cuda.current_stream(self.device))
        return pixels, errors

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """What this thread starts on a GPU goes to a stream of its own; its caller's goes on behind that.

        So memory that another thread's kernels still read is never this one's to decode into.
        """
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self.own, "stream"):
            self.own.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.own.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.own.stream)

    def _all(self, jpegs: Sequence[Encoded]) -> tuple[Tensor, dict[int, DecodeError]]:
        crop = self.transform.crop
        pixels = torch.empty((len(jpegs), crop, crop, 3), dtype=torch.uint8, device=self.device)
        errors: dict[int, DecodeError] = {}
        with torch.no_grad():
            left = [place for piece in _pieces(jpegs) for place in self._fill(pixels, jpegs, piece)]
        for place in left:
            try:
                pixels[place] = torch.tensor(_decode_on_cpu(jpegs[place], self.transform), device=self.device)
            except DecodeError as error:
                errors[place] = error
        if errors:
            pixels = pixels[[place for place in range(len(jpegs)) if place not in errors]]
        return pixels, errors

    def _fill(self, pixels: Tensor, jpegs: Sequence[Encoded], piece: slice) -> list[int]:
        """Decode a piece into its place in the batch; return the places of those that the device cannot do.

        The device fails for all images of a call at once: they are halved until those that it fails for stand alone.
        """
        try:
            pixels[piece] = self._decode(jpegs[piece])
            return []
        except RuntimeError as error:  # nvJPEG's and libjpeg's own, and no memory
            if piece.stop - piece.start == 1:
                log.debug("a JPEG is left to the CPU: %s", error)
                return [piece.start]
        middle = (piece.start + piece.stop) // 2
        halves = slice(piece.start, middle), slice(middle, piece.stop)
        return [place for half in halves for place in self._fill(pixels, jpegs, half)]

    def _decode(self, jpegs: Sequence[Encoded]) -> Tensor:
        """uint8 [N, crop, crop, 3] on the device. Raises RuntimeError where one of them cannot be decoded."""
        encoded = [torch.frombuffer(jpeg.data, dtype=torch.uint8) for jpeg in jpegs]
        finish(self.device)  # nvJPEG waits for no stream: it would write where the last images are still being read
        images = torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB, device=self.device)
        alike: dict[tuple[int, int, int], list[int]] = {}
        for place, (jpeg, image) in enumerate(zip(jpegs, images, strict=True)):
            if image.shape != (3, jpeg.height, jpeg.width):
                raise RuntimeError(f"{tuple(image.shape)} pixels of a JPEG of {jpeg.width} × {jpeg.height}")
            alike.setdefault((jpeg.width, jpeg.height, jpeg.orientation), []).append(place)
        found = torch.empty((len(jpegs), self.transform.crop, self.transform.crop, 3), device=self.device)
        for (_, _, orientation), places in alike.items():
            if len(places) == 1:  # photos are of many sizes: each step counts
                found[places[0]] = resize_crop(turned(images[places[0]][None], orientation), self.transform)[0]
            else:
                together = torch.stack([images[place] for place in places])
                found[places] = resize_crop(turned(together, orientation), self.transform)
        return found.round_().clamp_(0, 255).to(torch.uint8)

    def _probe(self) -> None:
        """One colour and one grey image must come back as they are."""
        for mode, colour in PROBE_COLOURS.items():
            file = io.BytesIO()
            Image.new(mode, (32, 32), colour if mode == "RGB" else colour[0]).save(file, "JPEG", quality=95)
            found = self._decode([Encoded(file.getvalue(), 32, 32, 1)]).float().mean((0, 1, 2)).cpu()
            if (found - torch.tensor(colour)).abs().max() > PROBE_TOLERANCE:
                raise RuntimeError(f"an image of {mode} {colour} comes back as {found.round().tolist()}")


def turned(images: Tensor, orientation: int) -> Tensor:
    """[N, 3, H, W] as stored → upright."""
    transposes, reverses = TURNS[orientation]
    images = images.transpose(-2, -1) if transposes else images
    return images.flip(reverses) if reverses else images


def resize_crop(images: Tensor, transform: Transform) -> Tensor:
    """uint8 [N, 3, H, W] → float32 [N, crop, crop, 3], not yet rounded: torchvision's evaluation transform.

    resize must not be less than crop.
    """
    (width, height), (left, top) = scaled_sizes(images.shape[-1], images.shape[-2], transform)
    x = functional.interpolate(
        images.float(), size=(height, width), mode=transform.interpolation, align_corners=False, antialias=True
    )
    return x[..., top : top + transform.crop, left : left + transform.crop].permute(0, 2, 3, 1)


def _decode_on_cpu(jpeg: Encoded, transform: Transform) -> np.ndarray:
    """As the loader would have done it; sizes it has checked."""
    turns = jpeg.orientation != 1
    return decode(bytes(jpeg.data), transform, max_pixels=sys.maxsize, exif_rotate=turns, exact=False).pixels


def _pieces(jpegs: Sequence[Encoded]) -> Iterator[slice]:
    """Images of at most DECODED_BYTES together, or one that is larger."""
    start = decoded_bytes = 0
    for place, jpeg in enumerate(jpegs):
        size = jpeg.width * jpeg.height * 3
        if place > start and decoded_bytes + size > DECODED_BYTES:
            yield slice(start, place)
            start, decoded_bytes = place, 0
        decoded_bytes += size
    if jpegs:
        yield slice(start, len(jpegs))
