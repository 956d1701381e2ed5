"""The names under which Prometheus and Ray know a run."""

import pyarrow as pa
import pytest

from pipeline import engine
from pipeline.config import RunConfig
from pipeline.metrics import labels
from pipeline.predictors import Predictor


class Brightness(Predictor):
    columns = pa.schema([("brightness", pa.float32())])


def of(output: str, **settings: object) -> dict[str, str]:
    return labels(RunConfig(input="photos", output=output, **settings), Brightness())


@pytest.mark.parametrize(
    ("output", "name", "uri"),
    [
        ("s3://bucket/night/embeddings/", "embeddings", "s3://bucket/night/embeddings"),
        ("s3://key:secret@bucket/out", "out", "s3://bucket/out"),
        ("/data/Größe in m²", "Gr-e-in-m-", "/data/Gr%C3%B6%C3%9Fe in m%C2%B2"),
    ],
)
def test_a_run_is_named_after_its_output_in_ascii_and_without_secrets(output: str, name: str, uri: str) -> None:
    found = of(output)
    assert found["output"] == uri
    assert found["run"].rpartition("-")[0] == name
    assert all(value.isascii() for value in found.values())


def test_runs_of_other_settings_have_other_names() -> None:
    assert of("out")["run"] == of("out", actors="2")["run"]
    assert of("out")["run"] != of("out", limit=3)["run"]


def test_a_stage_bears_the_name_of_its_predictor() -> None:
    class Überblick(Brightness):
        def settings(self) -> dict[str, object]:
            return {**super().settings(), "model": "timm:resnet50"}

    assert engine._named(engine.ModelActor, Brightness()).__name__ == "Brightness"
    assert engine._named(engine.ModelActor, Überblick()).__name__ == r"\xdcberblick timm:resnet50"
