"""The page of `nightshift serve` in a real browser."""

import base64
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import images
import numpy as np
import pytest
import scenes
from browser import PHONE, Browser, chromium, serving
from outputs import run_here, write_output
from scene_outputs import label
from scene_outputs import write_output as write_scene_output

from pipeline import Classifier, RunConfig, open_output
from pipeline.geo.windows import Tiling
from pipeline.output import directory
from pipeline.training import labels

KINDS = ("forest", "water", "urban", "field")
HOSTILE = (
    "<img src=x onerror=alert(1)>.jpg",
    'it\'s "quoted", & more.jpg',
    "photo_\u202egpj.exe.jpg",
    "two\nlines.jpg",
)
IMAGES = 40
DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], "dropped.jpg"));
document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
"""
LEFT, RIGHT, UP, DOWN, ENTER, ESCAPE, SHIFT = "\ue012", "\ue014", "\ue013", "\ue015", "\ue007", "\ue00c", "\ue008"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("downloads")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def quiet(browser: Browser) -> Iterator[None]:
    """The console of each page stays empty, and it asks no other host."""
    yield
    assert [message for message in browser.console() if "status of 4" not in message] == []


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for number in range(IMAGES):
            data = images.truncated() if number == 9 else images.encode(images.tile(KINDS[number % 4], number))
            member = tarfile.TarInfo(dict(enumerate(HOSTILE)).get(number, f"{KINDS[number % 4]}/{number:02d}.jpg"))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    predictor = Classifier(model="tiny:network", weights="random", embeddings=True)
    return Path(run_here(RunConfig(input=str(folder / "photos.tar"), output=str(folder / "out")), predictor))


def loaded(browser: Browser) -> bool:
    """All pictures in view are shown, or known to be missing."""
    cells = browser.run(
        "return [...document.querySelectorAll('.picture')].map((e) => e.firstElementChild?.tagName ?? '')"
    )
    return bool(cells) and all(cells)


def test_pictures_and_hostile_names(browser: Browser, classified: Path) -> None:
    with serving(str(classified)) as server:
        browser.open(server.url)
        browser.wait(lambda: loaded(browser))
        assert browser.text("#state") == "39 images, 1 error · tiny:network"
        assert browser.run("return document.querySelectorAll('.cell img').length") >= 30
        assert browser.run("return [...document.querySelectorAll('.cell img')].every((e) => e.naturalWidth === 128)")
        titles = browser.run("return [...document.querySelectorAll('.cell')].slice(0, 4).map((e) => e.title)")
        shown = [HOSTILE[0], HOSTILE[1], "photo_\\u202egpj.exe.jpg", "two\\x0alines.jpg"]
        assert [title.partition("#")[2] for title in titles] == shown
        assert browser.run("return document.querySelectorAll('script, [onerror], [src=x]').length") == 1  # page.js
        assert browser.run("return document.documentElement.outerHTML.includes('\\u202e')") is False
        assert {url.partition("?")[0].removeprefix(server.url) for url in browser.requests()} == {
            "", "page.css", "page.js", "api/summary", "api/rows", "api/pictures", "api/labels",
        }  # fmt: skip


def test_keys_neighbours_and_marks(browser: Browser, classified: Path, tmp_path: Path) -> None:
    with serving(str(classified)) as server:
        browser.open(server.url)
        browser.wait(lambda: loaded(browser))
        browser.find("#viewport").click()
        browser.keys(ESCAPE, "\ue011", RIGHT, RIGHT)  # Home
        browser.wait(lambda: "gpj.exe.jpg" in browser.text("#columns"))
        assert "\\u202e" in browser.text("#columns")
        for name in ("deer", '=cmd, "x"'):
            browser.find("#class-name").send_keys(name, ENTER)
        browser.keys(ESCAPE)
        browser.keys("d")
        browser.keys(RIGHT)
        browser.keys("c")
        browser.keys(SHIFT + RIGHT)
        browser.keys("d")
        assert browser.texts(".badge") == ["deer", "deer", "deer"]
        browser.keys("c")
        browser.keys(LEFT)
        assert browser.texts(".badge") == ["deer", '=cmd, "x"', '=cmd, "x"']
        browser.keys(ENTER)
        browser.wait(lambda: "similar to" in browser.text("#list-title") and loaded(browser))
        assert browser.texts(".cell .first span:last-child")[0] == "1.000"
        browser.keys(ESCAPE)
        browser.keys(ESCAPE)
        browser.wait(lambda: browser.text("#list-title") == "39 images")
        browser.open(server.url)  # marks survive
        browser.wait(lambda: browser.text("#mark-text") == "3 marks")
        browser.find("#show-marks").click()
        browser.wait(lambda: browser.text("#list-title") == "3 marked images" and len(browser.texts(".badge")) == 3)
        browser.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
        )
        browser.find("#export").click()
        browser.wait((tmp_path / "labels.csv").exists)
        found = labels.find(open_output(str(classified)), str(tmp_path / "labels.csv"))
        assert found.rows == (2, 3, 4)
        assert found.classes == (("deer",), ('=cmd, "x"',), ('=cmd, "x"',))
        assert found.unknown == ()


def test_filters_and_an_own_picture(browser: Browser, classified: Path, tmp_path: Path) -> None:
    with serving(str(classified)) as server:
        browser.open(server.url)
        browser.wait(lambda: loaded(browser))
        browser.keys("/")
        browser.keys("URBAN/1")
        browser.wait(lambda: browser.text("#list-title") == "3 of 39 images" and loaded(browser))
        assert browser.texts(".cell .name") == ["10.jpg", "14.jpg", "18.jpg"]
        browser.find("#list-close").click()
        browser.wait(lambda: browser.text("#list-title") == "39 images" and loaded(browser))
        browser.double_click(".cell:nth-of-type(6)")
        browser.wait(lambda: browser.text("#list-title").startswith("similar to 04.jpg") and loaded(browser))
        (tmp_path / "own.jpg").write_bytes(images.encode(images.tile(KINDS[2], 14)))
        browser.run("document.getElementById('file').hidden = false")
        browser.find("#file").send_keys(str(tmp_path / "own.jpg"))
        browser.wait(lambda: browser.text("#list-title").startswith("similar to own.jpg") and loaded(browser), 60)
        assert browser.texts(".cell .name")[0] == "14.jpg"
        browser.find("#list-close").click()
        browser.wait(lambda: browser.text("#list-title") == "39 images")
        browser.run(DROP, base64.b64encode((tmp_path / "own.jpg").read_bytes()).decode())
        browser.wait(lambda: browser.text("#list-title").startswith("similar to dropped.jpg"), 60)
        (tmp_path / "bad.jpg").write_text("no picture")
        browser.find("#file").send_keys(str(tmp_path / "bad.jpg"))
        browser.wait(lambda: "this picture cannot be read (not_an_image)" in browser.text("#notice"))


def test_scrolling_loads_what_is_shown(browser: Browser, tmp_path: Path) -> None:
    count = 20_000
    ids = [f"/photos/{number:05d}.jpg" for number in range(count)]
    vectors = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    folder = write_output(tmp_path / "out", ids, vectors, rows_per_part=count)
    with serving(str(folder)) as server:
        browser.open(server.url)
        browser.wait(lambda: loaded(browser))
        first = browser.requests()
        assert len(first) <= 12
        browser.run("document.getElementById('viewport').scrollTop = 1e9")
        browser.wait(lambda: browser.texts(".cell .name")[-1:] == [ids[-1]] and loaded(browser))
        asked = browser.requests()
        assert 2 <= len(asked) <= 8
        assert all("/api/" in url for url in asked)
        assert browser.run("return grid.items.size + pictures.size") < 250
        assert browser.run("return document.querySelectorAll('.cell').length") <= 48
        browser.keys("\ue011")
        browser.wait(lambda: browser.texts(".cell .first span:first-child")[:1] == ["00000.jpg"])


def test_a_map_and_clusters(browser: Browser, tmp_path: Path) -> None:
    path = scenes.write(tmp_path / "in" / "a.tif", scenes.numbers(3, 96, 128))
    out = write_scene_output(tmp_path / "out", [path], Tiling(32, 32), lambda place: label(place.across % 3))
    with serving(str(out)) as server:
        browser.open(server.url)
        browser.wait(lambda: browser.text("#list-title") == "12 images")
        browser.keys("3")
        browser.wait(lambda: browser.text("#plot-text") == "12 images")
        assert browser.texts("#legend li") == ["water", "forest", "urban"]
        browser.find("#canvas").click()
        browser.wait(lambda: "image_id" in browser.text("#columns"))
        browser.keys(LEFT)
        browser.keys("2")
        browser.wait(lambda: browser.text("#empty h2") == "No clusters")
        assert "nightshift embed" in browser.text("#empty p")
        browser.keys("1")
        assert browser.run("return document.getElementById('similar').hidden && document.getElementById('pick').hidden")


def test_clusters_lead_to_images(browser: Browser, classified: Path) -> None:
    with serving(str(classified)) as server:
        browser.open(server.url)
        browser.wait(lambda: browser.text("#list-title") == "39 images")
        browser.keys("2")
        browser.wait(lambda: "% of the variance" in browser.text("#plot-text"))
        canvas = browser.find("#canvas")
        canvas.send_keys(RIGHT)
        browser.wait(lambda: "image_id" in browser.text("#columns"))
        first = browser.text("#columns")
        canvas.send_keys(RIGHT, LEFT, UP, DOWN, LEFT)
        browser.wait(lambda: browser.text("#columns") != first)
        canvas.send_keys(ENTER)
        browser.wait(lambda: "similar to" in browser.text("#list-title"))
        browser.keys(ESCAPE, "2")
        browser.wait(lambda: "% of the variance" in browser.text("#plot-text"))
        browser.find("#select-box").click()
        browser.drag("#canvas")
        browser.wait(lambda: browser.text("#list-title") == "39 images of a box" and loaded(browser))


def test_pages_of_errors_empty_outputs_and_runs(browser: Browser, classified: Path, tmp_path: Path) -> None:
    with serving(str(classified)) as server:
        browser.open(server.url)
        browser.wait(lambda: browser.text("#list-title") == "39 images")
        browser.keys("4")
        browser.wait(lambda: browser.text("#error-range") == "1–1 of 1")
        assert "water/09.jpg" in browser.text("#error-rows")
    empty = write_output(tmp_path / "empty", [], np.empty((0, 4), np.float32), errors=["/photos/<b>a.jpg"])
    with serving(str(empty)) as server:
        browser.open(server.url)
        browser.wait(lambda: browser.text("#empty h2") == "No images")
        assert browser.text("#empty p") == "None of the images could be read: see the 1 error."
        browser.keys("4")
        browser.wait(lambda: "/photos/<b>a.jpg" in browser.text("#error-rows"))
    begun = write_output(tmp_path / "begun", [], np.empty((0, 4), np.float32))
    (begun / directory.SUCCESS).unlink()
    with serving(str(begun)) as server:
        browser.open(server.url)
        browser.wait(lambda: browser.text("#empty h2") == "Nothing yet")
        browser.keys("3")
        write_output(begun, [f"/p/{number}.jpg" for number in range(5)], np.eye(5, 4, dtype=np.float32) + 1, shard=1)
        (begun / directory.SUCCESS).unlink()
        browser.wait(lambda: browser.text("#empty h2") == "Nothing yet")
        browser.keys("1")
        browser.find("#again").click()
        browser.wait(lambda: browser.text("#list-title") == "5 images")
        assert "the run has not finished" in browser.text("#state")


def test_a_server_that_ended_is_named(browser: Browser, classified: Path) -> None:
    with serving(str(classified)) as server:
        browser.open(server.url)
        browser.wait(lambda: loaded(browser))
        browser.offline(True)
        try:
            browser.keys("4")
            browser.wait(lambda: "is nightshift serve still running?" in browser.text("#notice"))
        finally:
            browser.offline(False)
    assert any("ERR_INTERNET_DISCONNECTED" in message for message in browser.console())


def test_a_phone(browser: Browser, classified: Path) -> None:
    with serving(str(classified)) as server:
        browser.open(server.url, PHONE)
        browser.wait(lambda: loaded(browser))
        for name in ("images", "clusters", "map", "errors"):
            browser.find(f"[data-view={name}]").click()
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), name
        browser.find("[data-view=images]").click()
        assert browser.run("return document.getElementById('viewport').clientHeight > innerHeight / 2")
        browser.run("document.querySelectorAll('.cell')[4].click()")
        browser.wait(lambda: "image_id" in browser.text("#columns"))
        cell, panel = (browser.find(selector).rect for selector in (".cell.focus", "#detail"))
        assert cell["y"] + cell["height"] <= panel["y"] + 1
        browser.find("#similar").click()
        browser.wait(lambda: "similar to" in browser.text("#list-title"))
        sizes = browser.run(
            "return [...document.querySelectorAll('button')].filter((e) => e.offsetParent).map((e) => e.offsetHeight)"
        )
        assert min(sizes) >= 24
        assert json.dumps(browser.run("return getComputedStyle(document.body).fontSize")) == '"14px"'
