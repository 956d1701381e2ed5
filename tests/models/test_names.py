"""Names of networks and files, checked without an import of torch."""

from pathlib import Path

import pytest
import timm
import torchvision
from small_run import run_python

from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.models import names


def test_the_names_are_those_that_torchvision_registers() -> None:
    assert names.torchvision_names() == set(torchvision.models.list_models(module=torchvision.models))


def test_the_names_of_timm_are_those_that_it_knows() -> None:
    assert names.timm_names() == {*timm.list_models(), *timm.models._registry._deprecated_models}


def test_nothing_slow_is_imported_for_a_name_or_a_file() -> None:
    code = (
        "import sys\n"
        "from pipeline import Classifier\n"
        "Classifier(model='timm:resnet18').check()\n"
        "assert not {'torch', 'timm', 'ray'} & {*sys.modules}\n"
    )
    run_python("-c", code)


def test_local_files_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    for weights in ("DEFAULT", "random", "IMAGENET1K_V1", str(tmp_path / "w.pth"), "s3://bucket/w.pth"):
        names.check_files(weights, None)
        names.check_files(weights, str(tmp_path / "w.pth"))
        with pytest.raises(WeightsRefused, match=f"--labels {tmp_path}/none.txt cannot be read: no such file on"):
            names.check_files(weights, str(tmp_path / "none.txt"))
    with pytest.raises(WeightsRefused, match=f"--weights {tmp_path}/none.pth cannot be read: no such file"):
        names.check_files(str(tmp_path / "none.pth"), None)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    old = next(name for name in sorted(timm.models._registry._deprecated_models) if "." not in name)
    for good in ("resnet50", "timm:resnet18", "timm:resnet18.a1_in1k", f"timm:{old}", "package.module:function"):
        names.check(good)
    with pytest.raises(SettingRefused, match=r"'timm:resnet18x\.a1_in1k' is unknown: .*timm:resnet18"):
        names.check("timm:resnet18x.a1_in1k")
    with pytest.raises(SettingRefused, match="'resnet51' is unknown: did you mean resnet50"):
        names.check("resnet51")
