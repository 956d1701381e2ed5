"""The images of a replaced archive are compared with the rows of a run, shard by shard."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tile_archives import Tile, square, tile_image, write_mbtiles, write_pmtiles

from pipeline import sources
from pipeline.config import RunConfig
from pipeline.coverage import END, Ranges, contains, normalize, subtract
from pipeline.output import directory
from pipeline.output import ledger as ledgers
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.planning.compare import Comparison
from pipeline.planning.plan import Plan
from pipeline.planning.update import Change
from pipeline.sources import ReadOptions, Record, mbtiles, pmtiles
from pipeline.sources.tiles import hash_of

OCEAN = tile_image(10**6)
Write = Callable[[dict[Tile, bytes]], object]


class Computed:
    """A finished run: the tiles of every planned row as they were when they were computed. errors: their tiles."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], tuple[str, int]] = {}
        self.errors: set[tuple[int, int]] = set()

    def compute(self, plan: Plan) -> int:
        """Compute what is missing, as a run does; return the number of rows."""
        count = 0
        for shard, ranges in plan.remaining(plans.Coverage()):
            todo = subtract(ranges, self.covered(shard))
            for item in sources.read(plan.load(shard), todo, ReadOptions()) if todo else ():
                if not isinstance(item, Record):
                    continue
                for number, member in enumerate([item.member, *(each.member for each in item.repeats)]):
                    count += 1
                    if isinstance(item.data, bytes):
                        self.rows[shard, item.row + number] = str(member), hash_of(item.data)
                    else:
                        self.errors.add((shard, item.row + number))
        return count

    def drop(self, change: Change) -> None:
        for shard, ranges in change.dropped.items():
            self.rows = {
                key: value for key, value in self.rows.items() if key[0] != shard or not contains(ranges, key[1])
            }
            self.errors = {key for key in self.errors if key[0] != shard or not contains(ranges, key[1])}

    def covered(self, shard: int) -> Ranges:
        return normalize((row, row + 1) for index, row in [*self.rows, *self.errors] if index == shard)

    def hashes(self, shard: int, column: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        assert column == "tile_hash"
        found = [(row, value) for (index, row), (_, value) in self.rows.items() if index == shard]
        table = np.array(found, np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    @property
    def tiles(self) -> dict[str, int]:
        members = dict(self.rows.values())
        assert len(members) == len(self.rows), "no tile is two rows"
        return members


def names(tiles: dict[Tile, bytes]) -> dict[str, int]:
    return {"/".join(map(str, tile)): hash_of(data) for tile, data in tiles.items()}


@pytest.fixture(params=[".mbtiles", ".pmtiles"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (mbtiles, pmtiles):
        monkeypatch.setattr(module, "TILES_PER_SHARD", 16)
    return tmp_path / f"a{request.param}"


@pytest.fixture
def write(path: Path) -> Write:
    if path.suffix == ".mbtiles":
        return lambda tiles: write_mbtiles(path, tiles, "map")
    return lambda tiles: write_pmtiles(path, tiles, leaf_size=10)


class Run:
    """A run that is planned, computed and updated in memory."""

    def __init__(self, path: Path) -> None:
        self.output, self.done = path.parent / "out", Computed()
        self.archive = Archive(RunConfig(input=str(path), output=str(self.output)))
        self.plan = plans.make(str(self.output), self.archive.shards(), {})
        self.done.compute(self.plan)

    def update(self, failed: dict[int, Ranges] | None = None) -> int:
        """Return the number of rows that the update computed."""
        change = Change(self.plan, failed or {}, results=self.done)
        self.plan = plans.extend(self.plan, self.archive.new_shards(change), {}, change.dropped)
        self.done.drop(change)
        return self.done.compute(self.plan)


def test_updates_compute_only_what_differs(path: Path, write: Write) -> None:
    generator = np.random.default_rng(0)
    tiles = {tile: OCEAN if tile[1] % 2 else data for tile, data in square(5, 300).items()}
    write(tiles)
    run = Run(path)
    assert run.done.tiles == names(tiles)
    for step in range(1, 7):
        before, keys = dict(tiles), list(tiles)
        for number in generator.choice(len(keys), 5, replace=False).tolist():
            tiles[keys[number]] = tile_image(step * 1000 + number)
        for number in generator.choice(len(keys), 3, replace=False).tolist():
            tiles.pop(keys[number], None)
        tiles[5, 31, step] = OCEAN
        write(tiles)
        computed = run.update()
        assert computed == sum(before.get(tile) != data for tile, data in tiles.items())
        assert run.done.tiles == names(tiles)
        assert run.update() == 0
        total = run.plan.images({})
        assert total == len(tiles)


def test_the_same_tiles_in_a_new_file(path: Path, write: Write) -> None:
    tiles = square(5, 40)
    write(tiles)
    run = Run(path)
    write({**tiles, (5, 9, 9): OCEAN})
    write(tiles)
    shards = run.plan.shards
    assert run.update() == 0
    assert run.plan.shards == shards + 1, "a shard without rows has the new etag"
    assert run.update() == 0
    assert run.plan.shards == shards + 1


def test_only_rows_that_failed_are_read_again_from_the_same_file(
    path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = square(5, 40)
    write(tiles)
    run = Run(path)
    for row in (3, 4):
        del run.done.rows[1, row]
        run.done.errors.add((1, row))
    hashed: list[int] = []
    hashes = Comparison._hashes
    monkeypatch.setattr(Comparison, "_hashes", lambda *args: hashed.append(len(args[2])) or hashes(*args))  # type: ignore[func-returns-value]
    assert run.update({1: ((3, 5),)}) == 2
    assert run.done.tiles == names(tiles)
    assert set(hashed) == {0}, "the bytes of a file with the same etag are known"


def test_a_file_that_is_broken_now_drops_its_rows(path: Path, write: Write) -> None:
    write(square(5, 40))
    run = Run(path)
    path.write_bytes(b"broken")
    assert run.update() == 1
    assert (run.done.rows, len(run.done.errors)) == ({}, 1)
    write(square(5, 40))
    assert run.update({max(shard for shard, _ in run.done.errors): ((0, END),)}) == 40
    assert run.done.tiles == names(square(5, 40))


def test_rows_that_were_not_computed_yet_are_planned_again(path: Path, write: Write) -> None:
    tiles = square(5, 40)
    write(tiles)
    run = Run(path)
    for row in range(5, 9):
        del run.done.rows[0, row]
    write({**tiles, (5, 20, 20): OCEAN})
    assert run.update() == 5
    assert run.done.tiles == names({**tiles, (5, 20, 20): OCEAN})


def test_an_archive_without_tiles_drops_its_rows(path: Path, write: Write) -> None:
    write(square(5, 40))
    other = square(5, 3, 500)
    write_pmtiles(path.parent / "b.pmtiles", other)
    output = str(path.parent / "out")
    archive = Archive(RunConfig(input=[str(path), str(path.parent / "b.pmtiles")], output=output, zoom="5"))
    plan = plans.make(output, archive.shards(), archive.keep_types)
    plans.save(plan)
    ledgers.begin(output)
    write(square(4, 10))
    updated, _ = directory._update(plan, archive, lambda: None)
    assert updated.images({}) == 3
    loaded = plans.load(output)
    assert loaded is not None
    assert loaded.images({}) == 3
    again, change = directory._update(loaded, archive, lambda: None)
    assert again.images({}) == 3
    assert change.unchanged == 1
