"""The server of `nightshift serve`: what it answers, and whom it refuses."""

import base64
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import images
import numpy as np
import pytest
from browser import serving
from outputs import SETTINGS, run_here, write_output
from PIL import Image
from servers import ROOT, S3Server

from jobs import serve as job
from pipeline import Classifier, RunConfig, open_output
from pipeline.errors import OutputRefused, SettingRefused
from pipeline.explore.serve import plots, rows
from pipeline.explore.serve import server as servers
from pipeline.explore.serve.cache import Cache
from pipeline.explore.serve.rows import Filter, Rows
from pipeline.explore.serve.server import Server, make_server
from pipeline.explore.serve.site import Site
from pipeline.output import directory

KINDS = ("forest", "water", "urban", "field")
HOSTILE = ("<script>alert(1)</script>.jpg", 'it\'s "quoted" & more.jpg', "photo_\u202egpj.exe.jpg", "two\nlines.jpg")
IMAGES = 24
BAD = (7, 15)
ROWS = IMAGES - len(BAD)


class Client:
    """Requests to a server, with any headers."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.v = self.get("summary")["v"]

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        """Status, and the JSON of the answer, or its bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        try:
            connection.request(
                method, path, body or None, {name.replace("_", "-"): value for name, value in headers.items()}
            )
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(content) if is_json else content

    def get(self, name: str, **values: Any) -> Any:
        query = urllib.parse.urlencode({"v": getattr(self, "v", ""), **values})
        status, answer = self.send("GET", f"/api/{name}?{query}")
        assert status == 200, answer
        return answer

    def refused(self, name: str, **values: Any) -> tuple[int, str]:
        status, answer = self.send("GET", f"/api/{name}?{urllib.parse.urlencode({'v': self.v, **values})}")
        return status, answer["error"]

    def post(self, name: str, **content: Any) -> Any:
        status, answer = self.send(
            "POST", f"/api/{name}", json.dumps({"v": self.v, **content}).encode(), Content_Type="application/json"
        )
        assert status == 200, answer
        return answer

    def upload(self, data: bytes, **values: Any) -> tuple[int, Any]:
        query = urllib.parse.urlencode({"v": self.v, "count": 5, **values})
        return self.send("POST", f"/api/search?{query}", data, Content_Type="application/octet-stream")


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar with some hostile names and two broken images, classified with vectors."""
    folder = tmp_path_factory.mktemp("serve")
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for number in range(IMAGES):
            data = images.truncated() if number in BAD else images.encode(images.tile(KINDS[number % 4], number))
            name = dict(enumerate(HOSTILE)).get(number, f"{KINDS[number % 4]}/{number:02d}.jpg")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    predictor = Classifier(model="tiny:network", weights="random", embeddings=True)
    return Path(run_here(RunConfig(input=str(folder / "photos.tar"), output=str(folder / "out")), predictor))


@pytest.fixture(scope="module")
def client(classified: Path) -> Iterator[Client]:
    with serving(str(classified)) as server:
        yield Client(server)


# Who is refused


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:{port}.evil.example"},
        {"Host": "0.0.0.0:{port}"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_requests_of_other_sites_get_403(client: Client, headers: dict[str, str], method: str) -> None:
    sent = {name: value.replace("{port}", str(client.server.server_port)) for name, value in headers.items()}
    path = "/api/summary" if method == "GET" else "/api/pictures"
    status, answer = client.send(method, path, b"" if method == "GET" else b"{}", **sent)
    assert status == 403
    assert answer["error"].endswith(".") or "answers only to the address" in answer["error"]


def test_the_own_names_are_answered(client: Client) -> None:
    port = client.server.server_port
    for name in ("127.0.0.1", "localhost"):
        headers = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}", "Sec_Fetch_Site": "same-origin"}
        assert client.send("GET", "/api/summary", **headers)[0] == 200


def raw(server: Server, text: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page.js/../server.py",
        "/etc/passwd",
        "//etc/passwd",
        "/%2Fetc%2Fpasswd",
        "/..\\..\\etc\\passwd",
        "file:///etc/passwd",
        "http://127.0.0.1/",
        "/server.py",
        "/api/../page.js",
        "/api/picture?path=/etc/passwd",
        "/_run.json",
        "/?x=1",
    ],
)
def test_other_addresses_and_paths_get_403(client: Client, path: str) -> None:
    text = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{client.server.server_port}\r\nConnection: close\r\n\r\n"
    answer = raw(client.server, text.encode())
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"root:" not in answer


def test_a_request_without_a_host_or_with_two_gets_403(client: Client) -> None:
    host = f"Host: 127.0.0.1:{client.server.server_port}\r\n"
    for lines in ("", host * 2, host + "Host: evil.example\r\n"):
        assert raw(client.server, f"GET / HTTP/1.1\r\n{lines}\r\n".encode()).startswith(b"HTTP/1.1 403 ")


def test_the_page_may_load_nothing_from_elsewhere(client: Client) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        with urllib.request.urlopen(f"http://localhost:{client.server.server_port}{path}") as response:
            text = response.read().decode()
            assert response.headers["Content-Type"].startswith(kind)
            policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(
            r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|<[^>]+ (style|on\w+)=", text
        )


def test_only_this_machine_is_served(client: Client) -> None:
    assert client.server.server_address[0] == "127.0.0.1"
    with pytest.raises(SettingRefused, match=f"--port {client.server.server_port} cannot be used .*in use.*or 0 for"):
        make_server(client.server.site, client.server.server_port, print)


@pytest.mark.parametrize(
    ("headers", "body", "status", "message"),
    [
        ({"Content_Type": "text/plain"}, b"{}", 415, "must be of type application/json"),
        ({"Content_Type": "application/json"}, b"{", 400, "must be a JSON object"),
        ({"Content_Type": "application/json"}, b"[" * 60_000, 400, "must be a JSON object"),
        ({"Content_Type": "application/json"}, b" " * 70_000, 413, "at most 64 kB"),
        ({"Content_Type": "application/json", "Content_Length": "x"}, b"{}", 411, "must state the length"),
        ({"Content_Type": "application/json", "Content_Length": "-1"}, b"{}", 411, "must state the length"),
        ({"Content_Type": "application/json"}, b"{}", 409, "reload the page"),
    ],
)
def test_bad_bodies_get_a_sentence(
    client: Client, headers: dict[str, str], body: bytes, status: int, message: str
) -> None:
    found, answer = client.send("POST", "/api/pictures", body, **headers)
    assert found == status
    assert message in answer["error"]


@pytest.mark.parametrize(
    "wanted", [None, "0", [-1], [IMAGES], ["/etc/passwd"], [True], [1.5], list(range(20)) * 4, [[0]], {"0": 1}]
)
def test_only_numbers_of_rows_are_taken(client: Client, wanted: Any) -> None:
    body = json.dumps({"v": client.v, "rows": wanted}).encode()
    status, answer = client.send("POST", "/api/pictures", body, Content_Type="application/json")
    assert (status, answer["error"][:9]) == (400, "rows must")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("rows", {"start": "x"}, "start must be a whole number"),
        ("rows", {"start": 10**6}, "start must be a whole number"),
        ("rows", {"stop": 10**6}, "stop must be a whole number"),
        ("rows", {"text": "x" * 501}, "text must be a text of at most 500"),
        ("rows", {"low": "nan"}, "low must be a number"),
        ("rows", {"sort": "random"}, "sort must be one of"),
        ("rows", {"label": 99}, "label must be"),
        ("row", {"row": -1}, "row must be"),
        ("row", {}, "row must be"),
        ("neighbours", {"row": 0, "count": 10**6}, "count must be"),
        ("projection", {"method": "umap"}, "method must be one of pca, tsne"),
    ],
)
def test_bad_parameters_get_a_sentence(client: Client, name: str, values: dict[str, Any], message: str) -> None:
    status, error = client.refused(name, **values)
    assert status == 400
    assert message in error


# What is answered


def test_rows_and_their_names(client: Client, classified: Path) -> None:
    summary = client.get("summary")
    assert (summary["rows"], summary["errors"], summary["finished"]) == (ROWS, len(BAD), True)
    assert (summary["label"], summary["vectors"], summary["places"], summary["upload"]) == ("label", True, False, True)
    shown = client.get("rows", start=0, stop=200)["rows"]
    ids = open_output(str(classified)).take(np.arange(summary["rows"]), ["image_id"])["image_id"].to_pylist()
    assert [each["id"] for each in shown] == ids
    assert [each["id"].partition("#")[2] for each in shown[:4]] == list(HOSTILE)
    assert [each["row"] for each in client.get("rows", start=3, stop=6)["rows"]] == [3, 4, 5]
    assert client.post("some", rows=[5, 2])["rows"] == [shown[5], shown[2]]
    columns = client.get("row", row=2)["columns"]
    assert columns["image_id"] == ids[2]
    assert (columns["width"], len(columns["top_labels"])) == (64, 5)
    assert "embedding" not in columns


def test_rows_are_sorted_and_filtered_by_score(client: Client) -> None:
    scores = [each["score"] for each in client.get("rows", start=0, stop=200)["rows"]]
    lowest = client.get("rows", start=0, stop=200, sort="lowest")["rows"]
    assert [each["score"] for each in lowest] == sorted(scores)
    middle = sorted(scores)[10]
    found = client.get("rows", start=0, stop=200, low=middle, sort="highest")
    expected = sorted((score for score in scores if score >= middle - 1e-9), reverse=True)
    assert found["total"] >= len(expected) - 1
    assert [each["score"] for each in found["rows"]] == expected[: found["total"]]
    assert client.get("rows", start=0, stop=200, high=-1)["total"] == 0
    assert client.get("labels")["range"] == [min(scores), max(scores)]


def test_pictures_are_small_jpegs_of_the_rows(client: Client) -> None:
    found = client.post("pictures", rows=[0, 5, 21])["pictures"]
    assert set(found) == {"0", "5", "21"}
    opened = {row: Image.open(io.BytesIO(base64.b64decode(data))) for row, data in found.items()}
    assert {(image.format, image.size) for image in opened.values()} == {("JPEG", (128, 128))}
    number = 23  # row 21 of the results: two images before it are errors
    drawn = images.tile(KINDS[number % 4], number).resize((128, 128))
    difference = np.abs(np.asarray(drawn, float) - np.asarray(opened["21"], float)).mean()
    assert difference < 25
    large = client.post("pictures", rows=[5], size="large")["pictures"]["5"]
    assert Image.open(io.BytesIO(base64.b64decode(large))).size == (384, 384)


def test_neighbours_are_those_of_a_search(client: Client, classified: Path) -> None:
    found = client.get("neighbours", row=9, count=6)
    output = open_output(str(classified))
    name = output.take(np.array([9]), ["image_id"])["image_id"][0].as_py()
    hits = output.search(ids=[name], count=6).to_list()
    assert found["rows"][0] == 9
    np.testing.assert_allclose(found["similarities"], [hit["similarity"] for hit in hits], atol=1e-5)
    ids = [each["id"] for each in client.post("some", rows=found["rows"])["rows"]]
    assert sorted(ids) == sorted(hit["image_id"] for hit in hits)


def test_an_uploaded_picture_finds_itself(client: Client) -> None:
    status, found = client.upload(images.encode(images.tile(KINDS[2], 10)))
    assert status == 200
    assert found["rows"][0] == 9  # image 10, after one error
    assert found["similarities"][0] >= 0.9999


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images.text(), r"this picture cannot be read \(not_an_image\)"),
        (images.truncated(), r"this picture cannot be read \(truncated\)"),
        (images.bomb(), r"this picture cannot be read \(too_large\)"),
        (b"", "The file is empty: choose a picture"),
        (b"GIF89a" + bytes(50), "this picture cannot be read"),
    ],
)
def test_a_bad_upload_gets_a_sentence(client: Client, data: bytes, message: str) -> None:
    status, answer = client.upload(data)
    assert status == 422 if data else status in (411, 422)
    if data:
        assert re.search(message, answer["error"])
        assert "/tmp" not in answer["error"]


def test_an_upload_has_a_limit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "MAX_UPLOAD_BYTES", 2 << 20)
    status, answer = client.upload(bytes(3 << 20))
    assert (status, answer["error"]) == (413, "The file has 3.0 MB: at most 2 MB are accepted.")


def test_errors_are_listed_by_kind(client: Client) -> None:
    found = client.get("errors", start=0, stop=100)
    assert found["types"] == [{"type": "truncated", "count": 2}]
    assert [row["image_id"].partition("#")[2] for row in found["rows"]] == ["field/07.jpg", "field/15.jpg"]
    assert client.get("errors", text="FIELD/15")["total"] == 1
    assert client.get("errors", type="corrupt")["total"] == 0


def test_values_are_exact_in_a_browser() -> None:
    values = {"hash": 2**53 + 1, "place": [-118.123456789012, float("nan")], "none": None, "data": b"x"}
    expected = {"hash": "9007199254740993", "place": [-118.123456789012, None], "none": None, "data": "b'x'"}
    assert rows.as_json(values) == expected


# Outputs of other kinds


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 rows in 18 parts, with a kept column of kinds and no archive."""
    ids = [f"/photos/{'AB'[number % 2]}/{number:03d}.jpg" for number in range(120)]
    kept = {"kind": [("rare" if number == 50 else KINDS[number % 4]) if number != 5 else None for number in range(120)]}
    vectors = np.random.default_rng(1).normal(size=(120, 12)).astype(np.float32)
    return write_output(tmp_path_factory.mktemp("kinds") / "out", ids, vectors, kept=kept)


def test_any_column_of_texts_can_be_the_label(kinds: Path) -> None:
    with serving(str(kinds), "kind") as server:
        client = Client(server)
        labels = client.get("labels")
        assert sum(labels["counts"]) == 119
        assert labels["counts"] == sorted(labels["counts"], reverse=True)
        code = labels["names"].index("water")
        found = client.get("rows", start=0, stop=100, label=code)
        assert [each["row"] for each in found["rows"]] == [
            number for number in range(120) if number % 4 == 1 and number != 5
        ]
        both = client.get("rows", start=0, stop=100, label=code, text="b/01")
        assert [each["row"] for each in both["rows"]] == [13, 17]
        assert client.get("rows", start=0, stop=1)["rows"][0]["label"] == "forest"
    for column, message in (
        ("embedding", "is fixed_size_list.*texts or whole numbers"),
        ("none", "has no column none"),
    ):
        with pytest.raises(OutputRefused, match=message):
            Site(str(kinds), column)


def test_too_many_labels_are_refused_and_the_page_goes_on(kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LABELS", 3)
    with serving(str(kinds), "kind") as server:
        client = Client(server)
        assert client.refused("labels") == (422, client.refused("labels")[1])
        assert "more than 3 values" in client.refused("labels")[1]
        assert client.get("rows", start=0, stop=5)["total"] == 120


def test_a_moved_archive_leaves_pictures_out(kinds: Path) -> None:
    with serving(str(kinds)) as server:
        client = Client(server)
        assert client.post("pictures", rows=[0, 119])["pictures"] == {"0": "", "119": ""}
        assert client.get("neighbours", row=3, count=4)["rows"][0] == 3


def test_only_the_row_groups_that_are_shown_are_read(kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Rows(open_output(str(kinds)))
    read: list[int] = []
    original = type(opened.output).read
    monkeypatch.setattr(
        type(opened.output),
        "read",
        lambda self, group, columns: read.append(group.first) or original(self, group, columns),
    )
    for _ in range(2):
        assert [each["row"] for each in opened.to_list([100, 3, 4])] == [100, 3, 4]
    assert sorted(read) == [0, 98]
    assert opened.matching(Filter()) is None


def test_a_projection_keeps_neighbours_together() -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(300, 40)).astype(np.float32) * np.linspace(5, 0.1, 40, dtype=np.float32)
    points, explained = plots.principal_components(wide, 2)
    centred = wide - wide.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:2].T
    for column in range(2):
        assert abs(np.corrcoef(points[:, column], expected[:, column])[0, 1]) > 0.9999
    assert explained == pytest.approx((values[:2] ** 2).sum() / (values**2).sum(), rel=1e-3)
    assert plots.principal_components(np.ones((5, 1), np.float32), 2)[0].tolist() == [[0, 0]] * 5


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_clusters_are_apart(tmp_path: Path, method: str) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 16)) * 5
    vectors = (centres[np.arange(60) % 3] + rng.normal(size=(60, 16)) * 0.1).astype(np.float32)
    folder = write_output(tmp_path / "out", [f"/p/{number}" for number in range(60)], vectors)
    made = plots.project(Rows(open_output(str(folder))), method)
    assert made.rows.tolist() == list(range(60))
    assert made.points.min() >= 0
    assert made.points.max() <= 1
    distance = np.linalg.norm(made.points[:, None] - made.points[None], axis=2)
    same = (np.arange(60)[:, None] - np.arange(60)) % 3 == 0
    assert distance[same].max() < distance[~same].min()


def test_an_output_without_rows_says_so(tmp_path: Path) -> None:
    empty = write_output(tmp_path / "empty", [], np.empty((0, 4), np.float32), errors=["/photos/a.jpg"])
    with serving(str(empty)) as server:
        client = Client(server)
        summary = client.get("summary")
        assert (summary["rows"], summary["errors"], summary["finished"]) == (0, 1, True)
        assert client.get("rows", start=0, stop=10) == {"total": 0, "rows": []}
        assert client.get("labels")["names"] == []
        for name, values in (("neighbours", {"row": 0}), ("projection", {}), ("row", {"row": 0})):
            status, error = client.refused(name, **values)
            assert (status, "no rows yet" in error) == (422, True), name
        assert client.refused("places")[0] == 422
        assert client.upload(images.encode(images.tile()))[0] == 422


def test_a_run_in_progress_is_opened_again(tmp_path: Path) -> None:
    ids, vectors = [f"/p/{number}" for number in range(5)], np.eye(5, dtype=np.float32)
    folder = write_output(tmp_path / "out", ids, vectors)
    (folder / directory.SUCCESS).unlink()
    with serving(str(folder)) as server:
        client = Client(server)
        assert (client.get("summary")["rows"], client.get("summary")["finished"]) == (5, False)
        assert client.get("summary")["v"] == client.v
        write_output(folder, [f"/q/{number}" for number in range(5)], vectors, shard=1)
        assert client.get("rows", start=0, stop=9)["total"] == 5
        fresh = client.get("summary")
        assert (fresh["rows"], fresh["finished"]) == (10, True)
        assert client.refused("rows", start=0, stop=9) == (
            409,
            "The output has changed since this page was opened: reload the page.",
        )
        client.v = fresh["v"]
        assert client.get("rows", start=0, stop=9)["total"] == 10


def test_a_part_that_is_gone_gets_a_sentence(tmp_path: Path) -> None:
    folder = write_output(tmp_path / "out", [f"/p/{number}" for number in range(20)], np.eye(20, dtype=np.float32))
    with serving(str(folder)) as server:
        client = Client(server)
        next((folder / "results").glob("*.parquet")).unlink()
        status, error = client.refused("neighbours", row=0)
        assert status == 422
        assert "is gone: if a run has changed the output, read it again" in error


def test_windows_of_scenes_are_searched_by_row_alone(tmp_path: Path) -> None:
    tiling = {"size": 32, "stride": 32, "edge": "pad", "resolution": None, "max_nodata": 0.9}
    folder = write_output(
        tmp_path / "out", ["/s.tif#0"], np.ones((1, 8), np.float32), settings={**SETTINGS, "tiling": tiling}
    )
    with serving(str(folder)) as server:
        client = Client(server)
        assert client.get("summary")["upload"] is False
        status, answer = client.upload(images.encode(images.tile()))
        assert (status, "takes no pictures" in answer["error"]) == (422, True)


def test_an_output_in_a_bucket(s3: S3Server) -> None:
    uri = s3.uri("serve/out")
    write_output(uri, [f"s3://archive/{number}.jpg" for number in range(30)], np.eye(30, dtype=np.float32))  # type: ignore[arg-type]
    with serving(uri) as server:
        client = Client(server)
        assert client.get("rows", start=20, stop=22)["rows"][1]["id"] == "s3://archive/21.jpg"
        assert client.get("neighbours", row=29, count=1)["rows"] == [29]
        assert client.post("pictures", rows=[3])["pictures"] == {"3": ""}


def test_the_cache_keeps_what_was_used_last() -> None:
    cache: Cache[str, str] = Cache(10)
    for key in ("a", "b"):
        cache.add(key, key.upper(), 5)
    assert cache.get("a") == "A"
    cache.add("c", "C", 5)
    assert (cache.get("b"), cache.get("a"), cache.get("c")) == (None, "A", "C")
    cache.add("large", "L", 50)
    assert (cache.get("a"), cache.get("large"), cache.size_bytes) == (None, "L", 50)


# The command


def test_the_command_serves_until_it_is_stopped(classified: Path) -> None:
    link = classified.parent / "a\u202eb"
    link.symlink_to(classified)
    command = [sys.executable, "-m", "jobs.serve", str(link), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            first, second = process.stdout.readline(), process.stdout.readline()
            assert f"a\\u202eb: {ROWS} rows + {len(BAD)} errors" in first
            url = re.search(r"http://127\.0\.0\.1:\d+/", second)[0]  # type: ignore[index]
            with urllib.request.urlopen(url) as response:
                assert b"<title>Nightshift</title>" in response.read()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_refusals_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        ([str(tmp_path)], "is not an output of Nightshift"),
        ([str(tmp_path), "--port", "70000"], "--port is 70000: it must be a number from 0 to 65535"),
    ):
        assert job.main(arguments) == 2
        assert message in capsys.readouterr().err
