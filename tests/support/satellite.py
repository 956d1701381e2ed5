"""Small GeoTIFFs and checkpoints of many bands, drawn and written by GDAL and torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rasterio.io import MemoryFile
from rasterio.transform import from_origin
from torch import nn

SENTINEL2 = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
PRODUCT = "S2B_MSIL1C_20250302T095029_N0511_R079_T33UXP_20250302T104753"
OLD_PRODUCT = "S2A_MSIL1C_20170105T013442_N0204_R031_T53NMJ_20170105T013443"


def draw_dn(bands: int = 13, side: int = 64, seed: int = 0, low: int = 100, high: int = 5000) -> np.ndarray:
    """Random uint16 [bands, side, side], smooth enough for a resize."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(low, high, (bands, side // 8 + 1, side // 8 + 1))
    fine = np.kron(coarse, np.ones((8, 8)))[:, :side, :side]
    return (fine + random.uniform(0, 50, fine.shape)).astype(np.uint16)


def geotiff(
    array: np.ndarray,
    names: Sequence[str] = (),
    *,
    georeference: bool = True,
    tags: Mapping[str, str] | None = None,
    **profile: Any,
) -> bytes:
    """A GeoTIFF of [bands, height, width], as GDAL writes it. names: band descriptions. tags: of the whole file."""
    bands, height, width = array.shape
    if georeference:
        profile = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 10, 10), **profile}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", height=height, width=width, count=bands, dtype=array.dtype, **profile) as file:
            file.write(array)
            for place, name in enumerate(names, 1):
                file.set_band_description(place, name)
            file.update_tags(**(tags or {}))
        return memory.read()


def checkpoint(path: Path, bands: int, model: str = "resnet18", *, with_head: bool = False) -> nn.Module:
    """Write random weights of a timm ResNet, without its classifier as TorchGeo's are; return the network."""
    torch.manual_seed(bands)
    network: nn.Module = timm.create_model(model, in_chans=bands).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr,operator]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
    state = network.state_dict()
    torch.save({key: value for key, value in state.items() if with_head or not key.startswith("fc.")}, path)
    return network


def features(network: nn.Module, x: torch.Tensor) -> np.ndarray:
    """The pooled features of a timm network for one normalised image [bands, height, width]."""
    with torch.no_grad():
        return network.forward_head(network.forward_features(x[None]), pre_logits=True)[0].numpy()  # type: ignore
