"""Commits, attempts and the lock, on a real directory and on a real S3 server."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import S3Server

from pipeline import ledger as ledgers
from pipeline import lock as locks
from pipeline import output as outputs
from pipeline import plan as plans
from pipeline import sink, storage
from pipeline.errors import NightshiftError, OutputLocked, OutputRefused
from pipeline.ledger import Commit, Ledger
from pipeline.lock import Lock


def commit(output: str, attempt: int, shard: int, start: int, stop: int, **more: object) -> Commit:
    """Write a part and its commit as a sink would."""
    name = f"part-{attempt:04d}-{shard:06d}-{start:08d}"
    made = Commit(name, attempt, f"{name}-x.parquet", None, {shard: ((start, stop),)}, {}, stop - start, 0, **more)  # type: ignore[arg-type]
    storage.write(f"{output}/{made.part}", b"rows")
    storage.create(ledgers.commit_uri(output, name), made.to_json().encode())
    return made


def names(output: str) -> list[str]:
    return sorted(info.uri.rpartition("/")[2] for info in ledgers.parts(output))


class LedgerContract:
    def test_a_commit_reads_back_as_it_was(self, output: str) -> None:
        made = Commit(
            "part-0001-000002-00000000", 1, None, "e.parquet", {2: ((0, 3), (5, 6))}, {2: 6}, 0, 4, {"read/null": 4}
        )
        assert Commit.from_json(made.to_json()) == made

    def test_a_commit_of_before_usage_was_counted_reads_as_none_used(self, output: str) -> None:
        made = Commit("part-0001-000002-00000000", 1, "p.parquet", None, {2: ((0, 3),)}, {}, 3, 0, core_seconds=2.5)
        record = json.loads(made.to_json())
        for name in ("core_seconds", "gpu_seconds", "bytes_written"):
            del record[name]
        assert Commit.from_json(json.dumps(record)) == replace(made, core_seconds=0.0)

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

    def test_a_commit_that_comes_too_late_does_not_count(self, output: str) -> None:
        ledgers.begin(output)
        commit(output, 1, 0, 0, 10)
        ledgers.begin(output)
        late = commit(output, 1, 0, 10, 20)  # of a driver that was paused, then woken
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

    def test_of_two_drivers_in_the_same_moment_one_begins(self, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledgers, "last_attempt", lambda output: 0)  # both looked before either began
        ledgers.begin(output)
        with pytest.raises(OutputLocked, match="another driver started"):
            ledgers.begin(output)

    def test_sweep_removes_what_no_commit_names(self, output: str) -> None:
        ledger = ledgers.begin(output)
        kept = commit(output, 1, 0, 0, 10)
        ledger.accept(kept)
        storage.write(f"{output}/part-0001-000000-00000010-dead.parquet", b"rows")
        storage.write(f"{output}/_errors/part-0001-000000-00000010-dead.parquet", b"rows")
        assert ledgers.sweep(ledger) == 2
        assert names(output) == [kept.part]

    def test_a_driver_that_was_replaced_sweeps_nothing(self, output: str) -> None:
        first = ledgers.begin(output)
        second = ledgers.begin(output)
        kept = commit(output, second.attempt, 0, 0, 10)
        with pytest.raises(OutputLocked, match="another driver took over"):
            ledgers.sweep(first)
        assert names(output) == [kept.part]
        ledgers.check_newest(second)

    def test_what_a_removed_run_writes_late_counts_for_nothing(self, output: str) -> None:
        ledgers.begin(output)
        assert ledgers.void(output) == f"{output}/_attempts/2.json"
        commit(output, 1, 0, 0, 10)
        assert ledgers.begin(output).attempt == 3
        assert ledgers.read(output).rows == 0

    def test_remove_takes_a_commit_back(self, output: str) -> None:
        ledgers.begin(output)
        sink.remove(output, commit(output, 1, 0, 0, 10))
        assert names(output) == []
        assert ledgers.read(output).rows == 0

    def test_end_is_noted(self, output: str) -> None:
        ledger = ledgers.begin(output)
        ledgers.end(ledger, "done")
        record = json.loads(storage.read(f"{output}/_attempts/1.json"))
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
    def test_a_second_driver_is_refused_while_the_first_lives(self, tmp_path: Path) -> None:
        with Lock(str(tmp_path)), pytest.raises(OutputLocked, match=f"process {os.getpid()} on"), Lock(str(tmp_path)):
            pass

    def test_it_is_free_afterwards(self, tmp_path: Path) -> None:
        for _ in range(2):
            with Lock(str(tmp_path)):
                assert (tmp_path / "_lock.json").exists()
            assert not (tmp_path / "_lock.json").exists()

    def test_a_driver_that_stood_still_looks_before_it_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 60.0)  # its heart will not tell it
        with Lock(str(tmp_path)) as lock:
            time.sleep(0.6)
            lock.check()
            (tmp_path / "_lock.json").write_text(json.dumps({"id": "another"}))
            with pytest.raises(OutputLocked, match="another driver took over"):
                lock.check()

    def test_a_directory_that_cannot_be_written_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputRefused, match="cannot be written"), Lock(str(tmp_path / "file")):
            pass

    def test_a_dead_process_is_taken_over_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(locks, "LEASE_SECONDS", 60.0)
        code = f"import os; from pipeline.lock import Lock; Lock({str(tmp_path)!r}).__enter__(); os._exit(9)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 9
        started = time.monotonic()
        with Lock(str(tmp_path)):
            assert time.monotonic() - started < 10

    def test_another_machine_that_fell_silent_is_taken_over(self, tmp_path: Path) -> None:
        (tmp_path / "_lock.json").write_text(json.dumps({"id": "x", "host": "far/1", "pid": 1, "beat": 7}))
        started = time.monotonic()
        with Lock(str(tmp_path)) as lock:
            assert time.monotonic() - started >= 1.0
            lock.check()

    def test_a_driver_that_lost_its_lock_notices(self, tmp_path: Path) -> None:
        with Lock(str(tmp_path)) as lock:
            (tmp_path / "_lock.json").write_text(json.dumps({"id": "other", "host": "far/1", "pid": 1, "beat": 0}))
            assert lock.lost.wait(5)
            with pytest.raises(OutputLocked, match="took over"):
                lock.check()
        assert (tmp_path / "_lock.json").exists(), "the other driver's lock was removed"

    def test_a_lock_that_vanished_is_taken_again(self, tmp_path: Path) -> None:
        with Lock(str(tmp_path)) as lock:
            (tmp_path / "_lock.json").unlink()
            deadline = time.monotonic() + 5
            while not (tmp_path / "_lock.json").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            lock.check()

    def test_a_lock_that_vanished_while_the_driver_stood_still_is_lost(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another one may have taken it, done all the work and given it back."""
        monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 60.0)
        with Lock(str(tmp_path)) as lock:
            (tmp_path / "_lock.json").unlink()
            lock.beaten -= 0.8 * locks.LEASE_SECONDS
            lock.check()
            lock.beaten -= locks.LEASE_SECONDS
            with pytest.raises(OutputLocked, match="took over"):
                lock.check()

    def test_another_drivers_lock_is_left_to_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 60.0)  # its heart will not tell it
        with Lock(str(tmp_path)):
            (tmp_path / "_lock.json").write_text(json.dumps({"id": "another"}))
        assert (tmp_path / "_lock.json").exists()

    def test_a_beat_that_took_long_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = storage.write
        monkeypatch.setattr(storage, "write", lambda *given: (time.sleep(locks.LEASE_SECONDS), write(*given)))
        with Lock(str(tmp_path)) as lock:
            assert not lock.slow.is_set()
            assert lock.slow.wait(10)

    def test_a_process_of_another_namespace_is_not_known_by_its_number(self, tmp_path: Path) -> None:
        assert os.readlink("/proc/self/ns/pid") in Lock(str(tmp_path)).owner["host"]


def test_nothing_of_a_later_attempt_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver was replaced right after it had looked."""
    output = str(tmp_path)
    mine = ledgers.begin(output)
    ledgers.begin(output)
    for attempt in (1, 2):
        commit(output, attempt, 0, 0, 10)
    monkeypatch.setattr(ledgers, "check_newest", lambda ledger: None)
    assert ledgers.sweep(mine) == 2
    assert names(output) == ["part-0002-000000-00000000-x.parquet"]
    assert len(list(tmp_path.glob("_commits/*"))) == 1


@pytest.mark.parametrize("gone", ["part-0001-000000-00000000-x.parquet", "_commits/part-0001-000000-00000000.json"])
def test_finished_work_that_is_gone_is_told(tmp_path: Path, gone: str) -> None:
    ledger = ledgers.begin(str(tmp_path))
    ledger.accept(commit(str(tmp_path), 1, 0, 0, 10))
    ledgers.sweep(ledger)
    (tmp_path / gone).unlink()
    with pytest.raises(NightshiftError, match=f"1 files of finished work are gone, .*{gone} among them"):
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


def test_an_overwrite_that_is_cut_short_leaves_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path)
    storage.write(f"{folder}/_run.json", b"{}")
    ledgers.begin(folder)
    commit(folder, 1, 0, 0, 10)
    outputs.finish(folder)
    plan = plans.make(folder, [], {})
    deleted: list[str] = []
    monkeypatch.setattr(storage, "delete", lambda uri: Path(uri).unlink() if not deleted else 1 / 0)
    monkeypatch.setattr(outputs.ledgers, "void", lambda output: deleted.append(output))
    with pytest.raises(ZeroDivisionError):
        outputs._remove_all(plan, lambda: None)
    assert not outputs.is_finished(folder)
