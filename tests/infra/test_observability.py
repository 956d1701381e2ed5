"""A real Prometheus scrapes a real run on a real cluster. Every query of the dashboard and of the alerts works."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.util.state import list_actors, list_tasks
from servers import ROOT, free_port, start_ray_head, stop_ray_head
from whole import SLOW, Jobs, count_commits, wait_for, write_folder

OBSERVABILITY = ROOT / "infra" / "observability"
IMAGES, BAD_IMAGES = 480, 3
NEED_A_GPU = {"ray_nightshift_gpu_memory_bytes", "ray_node_gpus_utilization"}


def dashboard() -> dict[str, Any]:
    return dict(json.loads((OBSERVABILITY / "dashboard.json").read_text()))


def expressions() -> dict[str, str]:
    """Panel → its query, for all runs."""
    queries = {}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            queries[f"{panel['title']} {target['refId']}"] = (
                target["expr"].replace("$__rate_interval", "20s").replace("$run", ".*")
            )
    return queries


def alerts() -> dict[str, str]:
    (group,) = yaml.safe_load((OBSERVABILITY / "rules.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\bray_[a-z_]+", expression))


def own_metrics() -> set[str]:
    """The names of `pipeline/engine/metrics.py`, as Ray exports them."""
    source = (ROOT / "pipeline" / "engine" / "metrics.py").read_text()
    return {f"ray_nightshift_{name}" for name in re.findall(r'= _(?:Total|Level|counter|gauge)\("([a-z_]+)"', source)}


def test_every_metric_is_documented_and_shown() -> None:
    documented = (OBSERVABILITY / "README.md").read_text()
    assert {name for name in metric_names(documented) if name.startswith("ray_nightshift_")} == own_metrics()
    assert own_metrics() <= set().union(*map(metric_names, [*expressions().values(), *alerts().values()]))


def test_panels_do_not_overlap_and_have_a_data_source() -> None:
    shown = dashboard()
    assert shown["schemaVersion"] >= 38  # Grafana 10
    assert [each["name"] for each in shown["templating"]["list"]] == ["datasource", "run"]
    assert len({panel["id"] for panel in shown["panels"]}) == len(shown["panels"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in shown["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    for panel in shown["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["description"]


def test_gpu_metrics_have_the_names_of_ray() -> None:
    assert {name.removeprefix("ray_") for name in NEED_A_GPU - own_metrics()} <= METRICS_GAUGES.keys()


def tool(name: str) -> str:
    """Path of a Prometheus binary: from `make prometheus`, or installed on this machine."""
    path = os.pathsep.join([str(Path(sys.prefix, "tools", "usr", "bin")), os.environ.get("PATH", "")])
    return shutil.which(name, path=path) or pytest.skip(f"{name} is not installed: run make prometheus")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [("check", "rules", "rules.yaml"), ("test", "rules", "rules_test.yaml"), ("check", "config", "prometheus.yaml")],
    ids=" ".join,
)
def test_promtool_accepts(command: tuple[str, ...]) -> None:
    done = subprocess.run([tool("promtool"), *command], cwd=OBSERVABILITY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_alert_has_its_test() -> None:
    tests = yaml.safe_load((OBSERVABILITY / "rules_test.yaml").read_text())["tests"]
    tested = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert tested == alerts().keys()


@dataclass(frozen=True)
class Prometheus:
    address: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The current series of an expression."""
        return self._get("query", query=expression)

    def value(self, expression: str) -> float:
        (series,) = self.query(expression)
        return float(series["value"][1])

    def history(self, expression: str, since: float) -> list[dict[str, Any]]:
        """All series of an expression since a Unix time, at one value per second."""
        return self._get("query_range", query=expression, start=since, end=time.time(), step=1)

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._call("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: object) -> list[dict[str, Any]]:
        return list(self._call(f"{path}?{urllib.parse.urlencode(parameters)}")["result"])

    def _call(self, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self.address}/api/v1/{path}", timeout=30) as response:
                return dict(json.load(response)["data"])
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from error


@contextmanager
def running_prometheus(folder: Path, targets: Path) -> Iterator[Prometheus]:
    """With the project's configuration, but scraping every second, and this cluster's nodes."""
    settings = yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    settings["rule_files"] = [str(OBSERVABILITY / name) for name in settings["rule_files"]]
    (job,) = settings["scrape_configs"]
    job["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": "1s"}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_port()}"
    command = [
        *(tool("prometheus"), "--config.file", str(folder / "prometheus.yaml"), "--web.listen-address", address),
        *("--storage.tsdb.path", str(folder / "data"), "--log.level", "error"),
    ]
    process = subprocess.Popen(command)
    try:
        wait_for(lambda: _is_ready(address), 60)
        yield Prometheus(f"http://{address}")
    finally:
        process.kill()
        process.wait()


def _is_ready(address: str) -> bool:
    """While Prometheus starts, it refuses connections, then responds with 503."""
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=30):
            return True
    except OSError:
        return False


@dataclass(frozen=True)
class Watched:
    """A run that was killed and then resumed to its end, as recorded by Prometheus.

    began: Unix time. lost: values of run_active and of NightshiftRunLost after the kill.
    earlier_commits: commits of the first attempt. report: of the second attempt.
    """

    prometheus: Prometheus
    began: float
    output: Path
    lost: tuple[list[dict[str, Any]], list[dict[str, Any]]]
    earlier_commits: int
    report: dict[str, Any]
    tasks: set[str]
    actors: set[str]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    tool("prometheus")
    folder = tmp_path_factory.mktemp("watched")
    archive, output = write_folder(folder / "archive", IMAGES), folder / "vectors of überall"
    for number in range(BAD_IMAGES):  # reached by the second attempt
        (archive / f"{300 + 40 * number:04d}-bad.jpg").write_bytes(b"no image")
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_metrics_report_interval_ms": "1000",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}",
    }
    head, cluster = start_ray_head(environment)
    jobs = Jobs({**environment, "RAY_ADDRESS": cluster.address})
    job = ("--input", archive, "--output", output, *SLOW, "--batch-size", "16", "--rows-per-part", "16")
    ray_folder = Path(head.args[-1])  # type: ignore[index]
    with ExitStack() as running:
        running.callback(stop_ray_head, head)
        targets = ray_folder / "prom_metrics_service_discovery.json"
        prometheus = running.enter_context(running_prometheus(folder, targets))
        began = time.time()
        first = jobs.start("embed", *job)
        wait_for(lambda: bool(prometheus.query("ray_nightshift_images_total > 0")))
        first.send_signal(signal.SIGKILL)
        first.communicate()
        wait_for(lambda: not prometheus.query("ray_nightshift_run_active"), 30)
        lost = prometheus.query("ray_nightshift_run_active"), prometheus.query(alerts()["NightshiftRunLost"])
        earlier = count_commits(output)
        jobs.run("embed", *job)
        report = json.loads((output / "_report.json").read_text())
        wait_for(
            lambda: prometheus.value("max(last_over_time(ray_nightshift_done_images[5m]))") == report["planned"], 20
        )
        tasks = {task.name for task in list_tasks(address=cluster.dashboard, limit=5000)}
        actors = {actor.class_name for actor in list_actors(address=cluster.dashboard)}
        yield Watched(prometheus, began, output, lost, earlier, report, tasks, actors)


@pytest.mark.slow
def test_metrics_equal_the_report(watched: Watched) -> None:
    report, value = watched.report, watched.prometheus.value
    # The killed attempt did not report its last second, so its count is at most that of the second attempt.
    second = 'WorkerId=~"02000000f+"'
    committed = report["planned"] - report["resumed_images"]
    assert value(f"ray_nightshift_images_total{{{second}}}") == committed
    assert 0 < value('ray_nightshift_images_total{WorkerId=~"01000000f+"}') <= report["resumed_images"]
    assert report["planned"] == IMAGES + BAD_IMAGES
    assert report["errors_by_type"] == {"decode/not_an_image": BAD_IMAGES}
    assert value('sum(ray_nightshift_errors_total{stage="decode", error_type="not_an_image"})') == BAD_IMAGES
    assert value("max(last_over_time(ray_nightshift_done_errors[5m]))") == report["errors"] == BAD_IMAGES
    assert value("max(last_over_time(ray_nightshift_done_bytes[5m]))") == report["bytes_read"]
    assert value("max(last_over_time(ray_nightshift_planned_images[5m]))") == report["planned"]
    assert (
        0
        < value(f'ray_nightshift_stage_seconds_total{{{second}, stage="predict"}}')
        <= report["stage_seconds"]["predict"]
    )
    commits = value(f"ray_nightshift_commits_total{{{second}}}")
    assert commits == count_commits(watched.output) - watched.earlier_commits
    assert value("sum(ray_nightshift_batch_images_total)") >= IMAGES


@pytest.mark.slow
def test_series_name_their_run_and_output_in_ascii(watched: Watched) -> None:
    (run,) = {series["metric"]["run"] for series in watched.prometheus.query("ray_nightshift_images_total")}
    (output,) = {series["metric"]["output"] for series in watched.prometheus.query("ray_nightshift_images_total")}
    assert re.fullmatch(r"vectors-of-berall-[0-9a-f]{8}", run)
    assert urllib.parse.unquote(output) == str(watched.output)
    datasets = watched.prometheus.history("ray_data_dataset_state", watched.began)
    assert datasets
    assert all(series["metric"]["dataset"].startswith(f"{run}_") for series in datasets)


@pytest.mark.slow
def test_a_killed_driver_is_lost_until_the_run_resumes(watched: Watched) -> None:
    active, lost = watched.lost
    assert active == []
    assert len(lost) == 1
    assert watched.prometheus.query(alerts()["NightshiftRunLost"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("panel", expressions())
def test_every_query_of_the_dashboard_has_data(watched: Watched, panel: str) -> None:
    expression = expressions()[panel]
    series_list = watched.prometheus.history(expression, watched.began)
    assert series_list or metric_names(expression) & NEED_A_GPU, f"{panel}: {expression} has no data"
    for series in series_list:
        assert any(value != "NaN" for _, value in series["values"]), f"{panel}: {series['metric']}"


@pytest.mark.slow
def test_every_alert_is_evaluated_and_none_fires(watched: Watched) -> None:
    rules = watched.prometheus.rules()
    assert {rule["name"] for rule in rules} == alerts().keys()
    assert [(rule["name"], rule["health"], rule.get("lastError")) for rule in rules] == [
        (rule["name"], "ok", None) for rule in rules
    ]
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
    for name, expression in alerts().items():
        for metric in metric_names(expression) - NEED_A_GPU:
            assert watched.prometheus.history(metric, watched.began), f"{name}: {metric} does not exist"


@pytest.mark.slow
def test_the_dashboard_of_ray_shows_readable_stage_names(watched: Watched) -> None:
    stage = "MapWorker(MapBatches(Embedder tiny:slow_network))"
    assert {"Read and decode", f"{stage}.submit", "Write part"} <= watched.tasks
    assert stage in watched.actors
