"""The names of a run in Prometheus and Ray, and its metrics."""

from types import SimpleNamespace

import pyarrow as pa
import pytest

from pipeline.config import RunConfig
from pipeline.engine import flow
from pipeline.engine.metrics import ActorMetrics, RunMetrics
from pipeline.output.commit import Commit
from pipeline.output.ledger import Ledger
from pipeline.output.run_record import RunRecord
from pipeline.predictors.base import Predictor


class Brightness(Predictor):
    columns = pa.schema([("brightness", pa.float32())])


def of(output: str, **settings: object) -> dict[str, str]:
    return RunRecord.of(RunConfig(input="photos", output=output, **settings), Brightness()).labels


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


def test_runs_with_other_settings_have_other_names() -> None:
    assert of("out")["run"] == of("out", actors="2")["run"]
    assert of("out")["run"] != of("out", limit=3)["run"]


def test_a_stage_is_named_after_its_predictor() -> None:
    class Überblick(Brightness):
        def settings(self) -> dict[str, object]:
            return {**super().settings(), "model": "timm:resnet50"}

    assert flow._named(flow.ModelActor, Brightness()).__name__ == "Brightness"
    assert flow._named(flow.ModelActor, Überblick()).__name__ == r"\xdcberblick timm:resnet50"


def test_bad_images_of_all_attempts_are_exported() -> None:
    ledger = Ledger("out", attempt=2)
    plan = SimpleNamespace(uncounted_shards=0, images=lambda totals: 1_000, size_bytes=1)
    ledger.accept(Commit("part-1-0-0", 1, None, None, {0: ((0, 10),)}, {}, rows=7, errors=3))
    told = RunMetrics(RunConfig(input="photos", output="out"), plan, ledger, {})  # type: ignore[arg-type]
    assert (told.done_errors.value, told.done_images.value) == (3, 10)
    ledger.accept(Commit("part-2-0-10", 2, None, None, {0: ((10, 20),)}, {}, rows=8, errors=2))
    told.update()
    assert (told.done_errors.value, told.done_images.value) == (5, 20)


def test_the_end_of_a_shard_alone_does_not_count_as_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    actor = ActorMetrics({})
    monkeypatch.setattr(actor.capacity, "inc", told.append)
    for images in (64, 0, 3):
        actor.add(images, 64, None)
    assert told == [64, 64]
