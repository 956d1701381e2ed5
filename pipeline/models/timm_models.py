"""timm's networks and weights: `timm:<name>`."""

import importlib
from typing import Any

from torch import nn

from pipeline.errors import SettingRefused
from pipeline.images.transform import Transform
from pipeline.models.families import Family, WeightsSource
from pipeline.models.names import unknown_timm
from pipeline.models.transform_files import transform_of_timm


class TimmFamily(Family):
    """A network of timm. Its own weights are those of its pretrained_cfg.

    Raises SettingRefused if timm is not installed, the name is unknown, or the network needs images that are not square
    or are cropped in another way.
    """

    loads_own = True  # timm renames and reshapes some of its checkpoints as it loads them

    def __init__(self, model: str, seed: int) -> None:
        super().__init__(model, seed)
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError as error:
            raise SettingRefused(f"--model {model} needs timm: pip install 'nightshift[timm]'") from error
        self.timm, self.name = timm, model.removeprefix("timm:")
        self.config = self._config()
        self.transform = self._transform()

    def _config(self) -> dict[str, Any]:
        """The network's pretrained_cfg."""
        try:
            config = self.timm.get_pretrained_cfg(self.name) if self.timm.is_model(self.name) else None
        except RuntimeError:  # the network has no weights with this tag
            config = None
        if config is None:
            raise unknown_timm(self.model, self.timm.list_models())
        return dict(config.to_dict())

    def _transform(self) -> Transform:
        try:
            return transform_of_timm(self.config)
        except SettingRefused as error:
            raise SettingRefused(f"--model {self.model}: {error}") from error

    def network(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        names = {"num_classes": sizes.get("num_classes"), "in_chans": sizes.get("in_channels")}
        options = {name: value for name, value in names.items() if value}
        network: nn.Module = self.timm.create_model(self.name, pretrained=False, **options)
        return network

    def find_own(self, weights: str) -> WeightsSource | None:
        hub, url = self.config.get("hf_hub_id"), self.config.get("url")
        if weights != "DEFAULT" or not (hub or url):
            return None
        uri = f"hf://{hub}/{self.config.get('hf_hub_filename') or 'model.safetensors'}" if hub else url
        return WeightsSource(f"timm:{self.config['architecture']}.{self.config['tag']}", uri, True, self._labels())

    def _labels(self) -> tuple[str, ...]:
        """Class names; none if timm does not know them."""
        names = self.config.get("label_names")
        if not names and (subset := self.timm.data.infer_imagenet_subset(self.config)):
            info = self.timm.data.ImageNetInfo(subset)
            names = [info.index_to_description(index) for index in range(info.num_classes())]
        return tuple(names or ())

    def load(self, source: WeightsSource, path: str, sizes: dict[str, int], head: str) -> nn.Module:
        if not source.own:
            return super().load(source, path, sizes, head)
        overlay = {"file": path, "hf_hub_id": None, "url": ""}
        network: nn.Module = self.timm.create_model(self.name, pretrained=True, pretrained_cfg_overlay=overlay)
        return network
