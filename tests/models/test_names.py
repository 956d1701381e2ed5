"""Names of torchvision's networks without an import of torch."""

import pytest
import torchvision

from pipeline.errors import SettingRefused
from pipeline.models import names


def test_the_names_are_those_that_torchvision_registers() -> None:
    assert names.torchvision_names() == set(torchvision.models.list_models(module=torchvision.models))


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    for good in ("resnet50", "timm:anything", "package.module:function"):
        names.check(good)
    with pytest.raises(SettingRefused, match="'resnet51' is unknown: did you mean resnet50"):
        names.check("resnet51")
