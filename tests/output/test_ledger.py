"""Commits, attempts and the lock, in a real directory and on a real S3 server."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from servers import S3Server
from whole import wait_for

from pipeline.errors import NightshiftError, OutputLocked, OutputRefused
from pipeline.output import directory, parts
from pipeline.output import ledger as ledgers
from pipeline.output import lock as locks
from pipeline.output.commit import Commit
from pipeline.output.ledger import Ledger
from pipeline.output.lock import Lock
from pipeline.planning import plan as plans
from pipeline.storage import access


def commit(output: str, attempt: int, shard: int, start: int, stop: int, **more: object) -> Commit:
    """Write a part and its commit, as a sink does."""
    name = f"part-{attempt:04d}-{shard:06d}-{start:08d}"
    record = Commit(
        name, attempt, f"results/{name}-x.parquet", None, {shard: ((start, stop),)}, {}, stop - start, 0, **more
    )  # type: ignore[arg-type]
    access.write(f"{output}/{record.part}", b"rows")
    access.create(ledgers.commit_uri(output, name), record.to_json().encode())
    return record


def names(output: str) -> list[str]:
    return sorted(info.uri[len(output) + 1 :] for info in ledgers.parts(output))


class LedgerContract:
    def test_a_commit_is_equal_after_json(self, output: str) -> None:
        record = Commit(
            "part-0001-000002-00000000",
            1,
            None,
            "_errors/e.parquet",
            {2: ((0, 3), (5, 6))},
            {2: 6},
            0,
            4,
            {"read/null": 4},
        )
        assert Commit.from_json(record.to_json()) == record

    def test_a_commit_of_an_earlier_version_has_no_usage(self, output: str) -> None:
        record = Commit("part-0001-000002-00000000", 1, "p.parquet", None, {2: ((0, 3),)}, {}, 3, 0, core_seconds=2.5)
        values = json.loads(record.to_json())
        for name in ("core_seconds", "gpu_seconds", "bytes_written"):
            del values[name]
        assert Commit.from_json(json.dumps(values)) == replace(record, core_seconds=0.0)

    def test_attempts_add_up(self, output: str) -> None:
        first = ledgers.begin(output)
        assert first.accept(commit(output, 1, 0, 0, 10))
        assert first.accept(commit(output, 1, 3, 0, 5))
        second = ledgers.begin(output)
        assert second.attempt == 2
        assert second.coverage.of(0) == ((0, 10),)
        assert second.accept(commit(output, 2, 0, 10, 12))
        assert (second.earlier.rows, second.current.rows, second.rows) == (15, 2, 17)
        assert ledgers.read(output).rows == 17

    def test_a_commit_of_a_replaced_driver_does_not_count(self, output: str) -> None:
        ledgers.begin(output)
        commit(output, 1, 0, 0, 10)
        ledgers.begin(output)
        late = commit(output, 1, 0, 10, 20)  # by a driver that was paused and resumed
        assert ledgers.read(output).coverage.of(0) == ((0, 10),)
        third = ledgers.begin(output)
        assert third.coverage.of(0) == ((0, 10),)
        assert late.part in names(output)
        ledgers.sweep(third)
        assert late.part not in names(output)

    def test_overlapping_commits_are_refused(self, output: str) -> None:
        ledger = ledgers.begin(output)
        assert ledger.accept(commit(output, 1, 0, 0, 10))
        assert not ledger.accept(commit(output, 1, 0, 9, 12))
        assert ledger.rows == 10

    def test_only_one_of_two_drivers_begins_an_attempt(self, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledgers, "last_attempt", lambda output: 0)  # both read it before either began
        ledgers.begin(output)
        with pytest.raises(OutputLocked, match="another driver started"):
            ledgers.begin(output)

    def test_sweep_removes_parts_without_a_commit(self, output: str) -> None:
        ledger = ledgers.begin(output)
        kept = commit(output, 1, 0, 0, 10)
        ledger.accept(kept)
        access.write(f"{output}/results/part-0001-000000-00000010-dead.parquet", b"rows")
        access.write(f"{output}/_errors/part-0001-000000-00000010-dead.parquet", b"rows")
        assert ledgers.sweep(ledger) == 2
        assert names(output) == [kept.part]

    def test_a_replaced_driver_sweeps_nothing(self, output: str) -> None:
        first = ledgers.begin(output)
        second = ledgers.begin(output)
        kept = commit(output, second.attempt, 0, 0, 10)
        with pytest.raises(OutputLocked, match="another driver took over"):
            ledgers.sweep(first)
        assert names(output) == [kept.part]
        ledgers.check_newest(second)

    def test_a_late_commit_of_a_removed_run_does_not_count(self, output: str) -> None:
        ledgers.begin(output)
        assert ledgers.close_attempts(output) == f"{output}/_attempts/2.json"
        commit(output, 1, 0, 0, 10)
        assert ledgers.begin(output).attempt == 3
        assert ledgers.read(output).rows == 0

    def test_a_removed_commit_does_not_count(self, output: str) -> None:
        ledgers.begin(output)
        parts.remove(output, commit(output, 1, 0, 0, 10))
        assert names(output) == []
        assert ledgers.read(output).rows == 0

    def test_the_end_of_an_attempt_is_recorded(self, output: str) -> None:
        ledger = ledgers.begin(output)
        ledgers.end(ledger, "done")
        record = json.loads(access.read(f"{output}/_attempts/1.json"))
        assert record["status"] == "done"
        assert record["began"] <= record["ended"]


class TestLocal(LedgerContract):
    @pytest.fixture
    def output(self, tmp_path: Path) -> str:
        return str(tmp_path)


class TestS3(LedgerContract):
    @pytest.fixture
    def output(self, s3: S3Server, request: pytest.FixtureRequest) -> str:
        return s3.uri(f"ledger/{request.node.name}")


@pytest.fixture
def quick_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)


@pytest.mark.usefixtures("quick_lease")
class TestLock:
    def test_a_second_driver_is_refused_while_the_first_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(locks, "LEASE_SECONDS", 60.0)  # a busy machine may delay the heartbeat
        with Lock(str(tmp_path)), pytest.raises(OutputLocked, match=f"process {os.getpid()} on"), Lock(str(tmp_path)):
            pass

    def test_a_released_lock_can_be_taken(self, tmp_path: Path) -> None:
        for _ in range(2):
            with Lock(str(tmp_path)):
                assert (tmp_path / "_lock.json").exists()
            assert not (tmp_path / "_lock.json").exists()

    def test_a_driver_without_a_recent_heartbeat_reads_the_lock(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 60.0)  # no heartbeat in this test
        with Lock(str(tmp_path)) as lock:
            lock.beat_at -= 0.6 * locks.LEASE_SECONDS
            lock.check()
            (tmp_path / "_lock.json").write_text(json.dumps({"id": "another"}))
            with pytest.raises(OutputLocked, match="another driver took over"):
                lock.check()

    def test_an_output_that_is_deleted_is_named_as_such(self, tmp_path: Path) -> None:
        output = tmp_path / "out"
        with Lock(str(output)) as lock:
            (output / "_run.json").write_text("{}")
            wait_for(lambda: lock._has_run)
            lock.check()
            wait_for(lambda: shutil.rmtree(output, ignore_errors=True) or lock.deleted.wait(0.05))  # beside heartbeats
            with pytest.raises(OutputRefused, match=r"was deleted while this run was writing to it; run the same"):
                lock.check()
        assert not output.exists()

    def test_a_deleted_output_is_not_taken_for_another_driver(self, tmp_path: Path) -> None:
        ledger = ledgers.begin(str(tmp_path))
        shutil.rmtree(tmp_path / "_attempts")
        with pytest.raises(OutputRefused, match="was deleted"):
            ledgers.check_newest(ledger)

    def test_a_directory_that_cannot_be_written_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputRefused, match="cannot be written"), Lock(str(tmp_path / "file")):
            pass

    def test_the_lock_of_a_dead_process_is_taken_over_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(locks, "LEASE_SECONDS", 60.0)
        code = f"import os; from pipeline.output.lock import Lock; Lock({str(tmp_path)!r}).__enter__(); os._exit(9)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 9
        started = time.monotonic()
        with Lock(str(tmp_path)):
            assert time.monotonic() - started < 30

    def test_the_lock_of_another_machine_without_heartbeat_is_taken_over(self, tmp_path: Path) -> None:
        (tmp_path / "_lock.json").write_text(json.dumps({"id": "x", "host": "far/1", "pid": 1, "beat": 7}))
        started = time.monotonic()
        with Lock(str(tmp_path)) as lock:
            assert time.monotonic() - started >= 1.0
            lock.check()

    def test_a_driver_detects_that_it_lost_its_lock(self, tmp_path: Path) -> None:
        with Lock(str(tmp_path)) as lock:
            (tmp_path / "_lock.json").write_text(json.dumps({"id": "other", "host": "far/1", "pid": 1, "beat": 0}))
            assert lock.lost.wait(60)
            with pytest.raises(OutputLocked, match="took over"):
                lock.check()
        assert (tmp_path / "_lock.json").exists(), "the other driver's lock was removed"

    def test_a_deleted_lock_is_created_again(self, tmp_path: Path) -> None:
        with Lock(str(tmp_path)) as lock:
            (tmp_path / "_lock.json").unlink()
            deadline = time.monotonic() + 30
            while not (tmp_path / "_lock.json").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            lock.check()

    def test_a_lock_that_is_deleted_during_a_pause_is_lost(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another driver may have taken it, done all the work and released it."""
        monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 600.0)
        monkeypatch.setattr(locks, "LEASE_SECONDS", 100.0)
        with Lock(str(tmp_path)) as lock:
            (tmp_path / "_lock.json").unlink()
            lock.beat_at -= 0.8 * locks.LEASE_SECONDS
            lock.check()
            lock.beat_at -= locks.LEASE_SECONDS
            with pytest.raises(OutputLocked, match="took over"):
                lock.check()

    def test_the_lock_of_another_driver_is_not_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 60.0)  # no heartbeat in this test
        with Lock(str(tmp_path)):
            (tmp_path / "_lock.json").write_text(json.dumps({"id": "another"}))
        assert (tmp_path / "_lock.json").exists()

    def test_a_slow_heartbeat_is_reported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = access.write
        monkeypatch.setattr(access, "write", lambda *args: (time.sleep(locks.LEASE_SECONDS), write(*args)))
        with Lock(str(tmp_path)) as lock:
            assert not lock.slow.is_set()
            assert lock.slow.wait(60)

    def test_the_owner_of_a_lock_includes_its_process_namespace(self, tmp_path: Path) -> None:
        assert os.readlink("/proc/self/ns/pid") in Lock(str(tmp_path)).owner["host"]


def test_sweep_keeps_files_of_a_later_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is replaced right after its check."""
    output = str(tmp_path)
    ledger = ledgers.begin(output)
    ledgers.begin(output)
    for attempt in (1, 2):
        commit(output, attempt, 0, 0, 10)
    monkeypatch.setattr(ledgers, "check_newest", lambda ledger: None)
    assert ledgers.sweep(ledger) == 2
    assert names(output) == ["results/part-0002-000000-00000000-x.parquet"]
    assert len(list(tmp_path.glob("_commits/*"))) == 1


@pytest.mark.parametrize(
    "name", ["results/part-0001-000000-00000000-x.parquet", "_commits/part-0001-000000-00000000.json"]
)
def test_sweep_raises_if_a_committed_file_is_missing(tmp_path: Path, name: str) -> None:
    ledger = ledgers.begin(str(tmp_path))
    ledger.accept(commit(str(tmp_path), 1, 0, 0, 10))
    ledgers.sweep(ledger)
    (tmp_path / name).unlink()
    with pytest.raises(
        NightshiftError, match=f"1 files of finished work are missing, one is .*{name}; run jobs/verify.py"
    ):
        ledgers.sweep(ledger)


def test_ten_thousand_commits_are_read_in_seconds(tmp_path: Path) -> None:
    output = str(tmp_path)
    ledgers.begin(output)
    folder = tmp_path / "_commits"
    folder.mkdir()
    for i in range(10_000):
        name = f"part-0001-{i:06d}-00000000"
        (folder / f"{name}.json").write_text(Commit(name, 1, None, None, {i: ((0, 9),)}, {}, 9, 0).to_json())
    ledger = ledgers.begin(output)
    assert isinstance(ledger, Ledger)
    assert ledger.rows == 90_000


def test_an_interrupted_overwrite_leaves_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path)
    access.write(f"{folder}/_run.json", b"{}")
    ledgers.begin(folder)
    commit(folder, 1, 0, 0, 10)
    directory.finish(folder)
    plan = plans.make(folder, [], {})
    deleted: list[str] = []
    monkeypatch.setattr(access, "delete", lambda uri: Path(uri).unlink() if not deleted else 1 / 0)
    monkeypatch.setattr(directory.ledgers, "close_attempts", lambda output: deleted.append(output))
    with pytest.raises(ZeroDivisionError):
        directory._remove_all(plan, lambda: None)
    assert not directory.is_finished(folder)
