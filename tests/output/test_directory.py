"""The output directory at the start of a run. If the run is refused, nothing in it changes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_proxy import Rule, fault_proxy
from servers import S3Server
from whole import jpeg, write_folder

from pipeline.config import RunConfig
from pipeline.errors import InputRefused, OutputLocked, OutputRefused
from pipeline.output import directory
from pipeline.output import ledger as ledgers
from pipeline.output.run_record import RunRecord
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.storage import access, bucket


def predictor(model: str = "a") -> Any:
    return SimpleNamespace(settings=lambda: {"model": model}, provenance=dict)


def prepare(output: Path, *inputs: object, model: str = "a", check: Any = lambda: None, **settings: Any) -> Plan:
    output.mkdir(exist_ok=True)  # as the lock does
    config = RunConfig(input=[str(each) for each in inputs], output=str(output), **settings)
    record = RunRecord.of(config, predictor(model))
    return directory.prepare(config, record, Archive(config), check)[0]


def files(output: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", 4)


@pytest.fixture
def finished(tmp_path: Path, photos: Path) -> Path:
    output = tmp_path / "out"
    prepare(output, photos)
    ledgers.begin(str(output))
    (output / "results").mkdir()
    (output / "results/part-0001-000000-00000000-x.parquet").write_bytes(b"rows")
    directory.finish(str(output))
    return output


def test_a_bucket_that_cannot_be_written_is_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    access.write(s3.uri("mine/_run.json"), b"{}")
    with fault_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        bucket.bucket_store.cache_clear()
        directory.check_writable(s3.uri("mine"))
        proxy.set(Rule("access_denied", method="PUT"))
        with pytest.raises(OutputRefused, match=r"--output s3://archive/mine cannot be written: .*AccessDenied.*; use"):
            directory.check_writable(s3.uri("mine"))
        assert proxy.injected["access_denied"] == 1
        assert [info.uri for info in access.list_objects(s3.uri("mine"))] == [s3.uri("mine/_run.json")]
    bucket.bucket_store.cache_clear()


def lose_lock() -> None:
    raise OutputLocked("another driver took over")


def test_a_refused_overwrite_changes_nothing(tmp_path: Path, photos: Path, finished: Path) -> None:
    before = files(finished)
    with pytest.raises(InputRefused, match="does not exist"):
        prepare(finished, tmp_path / "photoss", overwrite=True)
    with pytest.raises(InputRefused, match="loose images have no columns"):
        prepare(finished, photos, overwrite=True, keep="label")
    with pytest.raises(OutputLocked):
        prepare(finished, photos, overwrite=True, check=lose_lock)
    assert {name: data for name, data in files(finished).items() if "/_plan/shards-" not in name or name in before} == (
        before
    )
    assert directory.is_finished(str(finished))


def test_a_damaged_run_can_be_overwritten(photos: Path, finished: Path) -> None:
    (finished / "_run.json").write_bytes(b"")
    with pytest.raises(OutputRefused, match=r"_run.json is damaged .*add --overwrite"):
        prepare(finished, photos)
    prepare(finished, photos, overwrite=True)
    assert json.loads((finished / "_run.json").read_text())["settings"]["model"] == "a"


def test_an_overwrite_removes_the_earlier_run_and_no_other_file(photos: Path, finished: Path) -> None:
    (finished / "mine.txt").write_text("not a file of a run")
    plan = prepare(finished, photos, overwrite=True, model="b")
    names = {path.name for path in finished.rglob("*") if path.is_file()}
    assert names == {
        *("_run.json", "plan.json", "2.json", "mine.txt", "empty.parquet"),
        *(name.partition("/")[2] for name in plan.files),
    }
    assert plans.load(str(finished)).files == plan.files  # type: ignore[union-attr]
    with pytest.raises(OutputRefused, match='model was "b" and is "a"'):
        prepare(finished, photos)


def test_the_corrected_command_continues_after_a_refused_input(tmp_path: Path, photos: Path) -> None:
    output = tmp_path / "out"
    for wrong in ({"input": photos, "keep": "label"}, {"input": tmp_path / "photoss"}):
        with pytest.raises(InputRefused):
            prepare(output, wrong.pop("input"), **wrong)
    plan = prepare(output, photos, model="b")
    assert plan.rows == 4
    assert {path.name for path in (output / "_plan").iterdir()} == {"plan.json", Path(plan.files[0]).name}


def test_a_driver_that_is_replaced_during_planning_saves_no_plan(tmp_path: Path, photos: Path) -> None:
    output = tmp_path / "out"
    other_plans: list[Plan] = []
    with pytest.raises(OutputLocked):
        prepare(output, photos, model="b", check=lambda: other_plans.append(prepare(output, photos)))
    plan = plans.load(str(output))
    assert plan is not None
    assert plan.files == other_plans[0].files
    assert json.loads((output / "_run.json").read_text())["settings"]["model"] == "a"


def test_an_interrupted_update_leaves_a_finished_run(photos: Path, finished: Path) -> None:
    assert prepare(finished, photos, update=True).rows == 4
    (photos / "new.jpg").write_bytes(jpeg(9))
    with pytest.raises(OutputLocked):
        prepare(finished, photos, update=True, check=lose_lock)
    assert directory.is_finished(str(finished))
    assert prepare(finished, photos, update=True).rows == 5
    assert not directory.is_finished(str(finished))


def test_an_update_plans_a_broken_parquet_as_an_error_row(photos: Path, finished: Path) -> None:
    (photos / "half.parquet").write_bytes(b"PAR1 cut")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), photos / "none.parquet")
    plan = prepare(finished, photos, update=True)
    assert (plan.shards, plan.rows, plan.uncounted_shards) == (3, 4, 1)
    directory.finish(str(finished))
    assert prepare(finished, photos, update=True).shards == 3, "a file without images is not new each time"
    assert directory.is_finished(str(finished))


def test_an_update_may_not_change_the_type_of_a_kept_column(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"image": [b"1"], "label": pa.array([1], pa.int64())}), folder / "a.parquet")
    prepare(tmp_path / "out", folder, keep="label")
    pq.write_table(pa.table({"image": [b"1"], "label": pa.array([1], pa.float64())}), folder / "b.parquet")
    with pytest.raises(InputRefused, match=r"--keep label: it is double in \S+b.parquet, but int64"):
        prepare(tmp_path / "out", folder, keep="label", update=True)


def test_what_a_run_wrote_after_its_output_was_deleted_does_not_block(photos: Path, finished: Path) -> None:
    shutil.rmtree(finished)
    for folder, name in (
        ("_commits", "part-0003-000000-00000000.json"),
        ("results", "part-0003-000000-00000000-x.parquet"),
    ):
        (finished / folder).mkdir(parents=True, exist_ok=True)
        (finished / folder / name).write_bytes(b"late")
    (finished / "_lock.json").write_bytes(b"{}")
    plan = prepare(finished, photos)
    assert plan.rows == 4
    assert [name for name in files(finished) if "part-0003" in name] == []


@pytest.mark.parametrize("name", ["notes.txt", "_plan/shards-0.parquet", "_attempts/1.json"])
def test_parts_beside_other_files_are_never_removed(photos: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "copy"
    for each in ("_commits/part-0001-000000-00000000.json", "results/part-0001-000000-00000000-x.parquet", name):
        (output / each).parent.mkdir(parents=True, exist_ok=True)
        (output / each).write_bytes(b"kept")
    before = files(output)
    with pytest.raises(OutputRefused, match=r"but no _run\.json"):
        prepare(output, photos)
    assert files(output) == before


def test_a_copy_of_the_parts_alone_is_never_removed(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    (output / "results").mkdir(parents=True)
    (output / "results/part-0001-000000-00000000-x.parquet").write_bytes(b"kept")
    with pytest.raises(OutputRefused, match=r"but no _run\.json"):
        prepare(output, photos)
    assert len(files(output)) == 1


def test_the_early_check_accepts_a_damaged_plan_that_is_overwritten(photos: Path, finished: Path) -> None:
    (finished / "_plan" / "plan.json").write_text("{")
    config = RunConfig(input=str(photos), output=str(finished))
    overwriting = replace(config, overwrite=True)
    directory.check(overwriting, Archive(overwriting))
    with pytest.raises(OutputRefused, match=r"plan\.json is damaged"):
        prepare(finished, photos)
