"""Flags, config files, exit codes."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs.classify import VectorFlags
from jobs.nightshift import COMMANDS
from pipeline import cli
from pipeline.config import RunConfig
from pipeline.errors import Interrupted, NotWhole, OutputLocked, Refused, SettingRefused, TooManyErrors
from pipeline.output import directory
from pipeline.output.lock import Lock
from pipeline.output.run_record import fingerprint
from pipeline.planning import plan as plans
from pipeline.predictors.classify import Classifier
from pipeline.predictors.embed import Embedder
from pipeline.report import messages
from pipeline.version import __version__

FLAGS = {
    "--input", "--output", "--keep", "--image-column", "--uri-column", "--any-suffix", "--zoom", "--bbox", "--datetime",
    "--assets", "--limit", "--phash", "--quality",
    "--max-pixels", "--exif-rotate",
    "--decoder", "--batch-size", "--rows-per-part", "--actors", "--gpus-per-actor", "--max-error-rate", "--overwrite",
    "--update", "--cluster", "--prices", "--dry-run", "--bands", "--scale", "--nodata-fill", "--quiet", "--verbose",
    "--log-file", "--harmonize", "--any-values",
    "--tile-size", "--tile-stride", "--edge", "--resolution", "--resampling", "--max-nodata", "--geoparquet",
}  # fmt: skip
NETWORK_FLAGS = {
    "--model", "--weights", "--precision", "--compile", "--seed", "--embedding-dtype", "--resize", "--crop",
    "--interpolation", "--mean", "--std", "--input-spec", "--transform",
}  # fmt: skip


@dataclass
class OneFlag:
    """A predictor with one flag."""

    model: str = field(default="resnet18", metadata={"help": "network"})


def parsed(*arguments: str) -> tuple[dict, dict]:
    return cli.parse(OneFlag, "", arguments)[:2]


def test_flags_become_fields() -> None:
    run, predictor = parsed(
        "--input", "a", "b", "--output", "o", "--limit", "5", "--max-error-rate", "0.5", "--no-exif-rotate",
        "--keep", "x,y", "--keep", "z", "--model", "vgg11", "--overwrite",
    )  # fmt: skip
    config = RunConfig(**run)
    assert (config.input, config.limit, config.max_error_rate) == (("a", "b"), 5, 0.5)
    assert (config.exif_rotate, config.overwrite, config.keep) == (False, True, ("x", "y", "z"))
    assert predictor == {"model": "vgg11"}


def test_a_value_may_start_with_a_minus() -> None:
    run, _ = parsed("--input", "a", "--output", "o", "--scale", "-1:1", "--nodata-fill", "-.5", "--bands", "3,2,1")
    config = RunConfig(**run)
    assert (config.scale_range(), config.nodata_fill, config.band_names()) == ((-1.0, 1.0), -0.5, ("3", "2", "1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "3000"}, "--scale is '3000': it must be MIN:MAX"),
        ({"zoom": "14:12"}, "--zoom is '14:12': it must be a zoom from 0 to 29, or MIN:MAX"),
        ({"zoom": "x"}, "--zoom is 'x'"),
        ({"zoom": "1_2"}, "--zoom is '1_2'"),
        ({"zoom": "3:"}, "--zoom is '3:'"),
        ({"zoom": "1" * 5000}, "--zoom is '1111"),
        ({"bbox": "1_0,2,30,40"}, "--bbox is '1_0,2,30,40'"),
        ({"scale": "0:1_000"}, "--scale is '0:1_000'"),
        ({"bands": "9" * 5000}, "--bands is '99999999999999999999…': it must be numbers from 1"),
        ({"datetime": "0001-01-01T00:00:00+14:00"}, "is outside of the years 1 to 9999 in UTC"),
        ({"tile_size": 64, "resolution": 5e-324}, "--resolution is 4.94066e-324: it must be a number of metres from"),
        ({"tile_size": 64, "resolution": 1e300}, r"--resolution is 1e\+300: it must be"),
        ({"tile_size": 64, "resolution": float("nan")}, "--resolution is nan"),
        ({"zoom": "30"}, "--zoom is '30'"),
        ({"bbox": "1,2,3"}, "--bbox is '1,2,3': it must be W,S,E,N in degrees"),
        ({"bbox": "1,5,3,4"}, "--bbox is '1,5,3,4'"),
        ({"bbox": "1,2,1,4"}, "--bbox is '1,2,1,4'"),
        ({"bbox": "1,2,181,4"}, "--bbox is '1,2,181,4'"),
        ({"bbox": "nan,2,3,4"}, "--bbox is 'nan,2,3,4'"),
        ({"bbox": "500000,5000000,510000,5010000"}, "longitudes from -180 to 180"),
        ({"scale": "1:0"}, "it must be MIN:MAX, two numbers"),
        ({"harmonize": "yes"}, "--harmonize is 'yes': it must be one of auto, on, off"),
        ({"scale": "0:inf"}, "it must be MIN:MAX"),
        ({"bands": "0,1,2"}, "--bands is '0,1,2': it must be numbers from 1 or names"),
        ({"bands": "1,,2"}, "it must be numbers from 1 or names"),
        ({"scale": "0:1", "nodata_fill": 2.0}, "--nodata-fill is 2: it must be a number within --scale"),
        ({"nodata_fill": float("nan")}, "it must be a number within --scale"),
    ],
)
def test_bands_and_values_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        RunConfig(input="a", output="o", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [",", "a,", "a,,b", ":b", ["a", ","]])
def test_an_empty_name_of_a_kept_column_is_refused(keep: str | list[str]) -> None:
    with pytest.raises(SettingRefused, match=r"--keep is '.*': it names an empty column"):
        RunConfig(input="a", output="o", keep=keep)
    assert RunConfig(input="a", output="o", keep="").keep == ()


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("input: [a]\noutput: o\nlimit: 7\nbatch-size: 16\nmodel: vgg11\n")
    run, predictor = parsed("--config", str(file), "--limit", "9")
    assert run == {"input": ["a"], "output": "o", "limit": 9, "batch_size": 16}
    assert predictor == {"model": "vgg11"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nosuch: 1", "there is no flag nosuch"),
        ("- 1", "must have one flag per line"),
        ("a: [", "cannot be read"),
        ("model: {a: b}", "model is .* one value"),
        ("input: [a, [b]]", "input is .* one value or a list of them"),
        ("limit: [1, 2]", "limit is .* one value"),
        ("overwrite: [true]", "overwrite is .* one value"),
        ("overwrite: maybe", "overwrite is 'maybe': it must be true or false"),
        ("limit: 5\ninput: a\nlimit: 6", "cannot be read: line 3: the key limit is given twice"),
        ("rows-per-part: 5\nrows_per_part: 6", "rows_per_part is given twice, as rows-per-part and as rows_per_part"),
        ("limit: 010", "limit is '010': it must be a number without a leading zero"),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(SettingRefused, match=message):
        parsed("--config", str(file))
    with pytest.raises(SettingRefused, match="cannot be read"):
        parsed("--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("text", ["limit: ten", "max_error_rate: 5%", "batch_size: 16.5"])
def test_a_value_in_the_file_is_checked_like_a_flag(tmp_path: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parsed("--config", str(file))
    assert ended.value.code == 2
    assert f"--{text.partition(':')[0].replace('_', '-')}: invalid" in capsys.readouterr().err


def test_a_transform_in_flags_and_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("input: a\noutput: o\nmean: [0.5, 0.4, 0.3]\nstd: 0.2\ncrop: 32\nresize: 40")
    _, values = cli.parse(Embedder, "", ["--config", str(file), "--crop", "24", "--std", "0.1,0.2,0.3"])
    assert values == {"mean": ["0.5", "0.4", "0.3"], "std": ["0.1,0.2,0.3"], "crop": 24, "resize": 40}
    Embedder(**values)


def test_values_in_the_file_are_read_as_text(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "input: 2024\noutput: o\nactors: 1:8\nkeep: [a, b]\n"
        "overwrite: 'no'\nexif-rotate: False\nupdate: on\nlimit: NULL"
    )
    run, _ = parsed("--config", str(file))
    assert run == {
        "input": ["2024"], "output": "o", "actors": "1:8", "keep": ["a", "b"],
        "overwrite": False, "exif_rotate": False, "update": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input": ()}, "--input is missing"),
        ({"output": ""}, "--output is missing"),
        ({"limit": 0}, "--limit is 0: it must be at least 1"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"max_error_rate": 2.0}, "--max-error-rate is 2.0: it must be between 0 and 1"),
        ({"actors": "4:2"}, "--actors is '4:2'"),
        ({"actors": "many"}, "--actors is 'many'"),
        ({"gpus_per_actor": "1.5"}, "--gpus-per-actor is '1.5'"),
        ({"gpus_per_actor": "inf"}, "--gpus-per-actor is 'inf'"),
        ({"gpus_per_actor": "nan"}, "--gpus-per-actor is 'nan'"),
        ({"output": "s3:/x"}, "^--output s3:/x is neither a path nor a URI: write s3://"),
        ({"output": "s3://"}, "^--output s3:// names no bucket: write s3://bucket/path"),
        ({"output": "s3:///x"}, "^--output s3:///x names no bucket"),
        ({"output": "http://user:secret@host/x"}, "^--output http://host/x cannot be written, http:// is read only"),
        ({"output": "foo://x"}, "^--output foo://x has an unsupported scheme: .*foo"),
        ({"output": "/proc/x"}, "^--output /proc/x is in a file system of the kernel"),
        ({"output": "memory://x"}, "^--output memory://x exists only in the memory of one process"),
        ({"input": ("a", "gs:/b/x")}, "^--input gs:/b/x is neither a path nor a URI: write gs://"),
        ({"input": "gs://"}, "^--input gs:// names no bucket"),
        ({"input": "foo://x/y"}, "^--input foo://x/y has an unsupported scheme"),
    ],
)
def test_bad_settings_are_refused_with_value_and_remedy(values: dict, message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        RunConfig(**{"input": ("a",), "output": "o", **values})


def test_other_uris_are_accepted() -> None:
    for output in ("./s3:/x", "a:b", "file:///x", "/dev/shm/x", "abfs://c@account/x", "hf://buckets/a/b", "/process"):
        RunConfig(input=("https://host/a.jpg", "photos/{0..9}:/x", "s3://b/*.tar"), output=output)


def test_a_seed_has_64_bits() -> None:
    for seed in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(SettingRefused, match=f"^--seed is {seed}: it must be a number of at most 64 bits"):
            Embedder(seed=seed)
    assert Embedder(seed=(1 << 64) - 1).seed == (1 << 64) - 1


def test_actors_and_gpus() -> None:
    config = RunConfig(input="a", output="o", actors="2:6", gpus_per_actor="0.5")
    assert (config.actor_range(), config.gpu_share()) == ((2, 6), 0.5)
    assert RunConfig(input="a", output="o").actor_range() is None


def test_the_fingerprint_changes_only_with_settings_that_change_results() -> None:
    base = RunConfig(input="a", output="o").result_settings()
    for values in ({"limit": 3}, {"keep": "x"}, {"exif_rotate": False}, {"max_pixels": 9}):
        assert fingerprint(RunConfig(input="a", output="o", **values).result_settings()) != fingerprint(base)
    for values in ({"batch_size": 3}, {"actors": "2"}, {"max_error_rate": 0.5}, {"output": "p"}):
        assert fingerprint(RunConfig(**{"input": "a", "output": "o", **values}).result_settings()) == fingerprint(base)


@pytest.mark.parametrize(
    ("error", "code"),
    [(Refused("x"), 2), (TooManyErrors("x"), 3), (OutputLocked("x"), 4), (NotWhole("x"), 5)],
)
def test_an_expected_error_ends_with_one_line_and_its_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture
) -> None:
    def work() -> int:
        raise error

    assert cli.guarded(work) == code
    assert capsys.readouterr().err == "nightshift: x\n"


IMPORTS_TORCH = """
from pipeline import cli
from pipeline.errors import OutputLocked
from pipeline.threads import in_background

def work():
    def prepare():
        started.set()
        import torch
    started = threading.Event()
    in_background(prepare)
    started.wait()
    time.sleep(DELAY)
    raise OutputLocked("x")

import threading, time
cli.leave(cli.guarded(work))
"""


@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8])
def test_a_refusal_ends_with_its_code_while_a_thread_imports_torch(delay: float) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS_TORCH.replace("DELAY", str(delay))], capture_output=True)
    assert (done.returncode, done.stderr) == (4, b"nightshift: x\n")


REFUSED_EARLY = """
import sys
from jobs import embed
code = embed.main(sys.argv[1:])
print(code, sorted({"ray", "torch"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "missing"], "does not exist"),
        (["--input", "."], "(not read)"),
        (["--input", ".", "--model", "resnet51"], "did you mean resnet50"),
        (["--input", ".", "--output", "foreign"], "not an output of Nightshift"),
    ],
)
def test_a_refusal_comes_before_slow_imports_and_leaves_nothing(tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.txt").touch()
    done = subprocess.run(
        [sys.executable, "-c", REFUSED_EARLY, "--output", "new/out", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "2 []\n", done.stderr
    assert message in done.stderr
    assert not (tmp_path / "new").exists()


TINY = ["--model", "tiny:network", "--weights", "random"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "missing"], "does not exist"),
        (["--output", "foreign"], "not an output of Nightshift"),
        (["--output", "other"], "belongs to a run with other settings"),
        (["--output", "photos/a.jpg/x"], "cannot be written"),
        (["--cluster", "8xnosuch"], "nosuch"),
        (["--keep", "image_id"], "there is already a column"),
        (["--keep", "x"], "loose images have no columns"),
    ],
)
def test_a_dry_run_refuses_what_the_job_would_refuse(
    tmp_path: Path, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for folder in ("foreign", "other", "photos"):
        (tmp_path / folder).mkdir()
    (tmp_path / "foreign" / "a.txt").touch()
    (tmp_path / "photos" / "a.jpg").touch()
    (tmp_path / "other" / "_run.json").write_text('{"layout": 2, "settings": {"model": "other"}}')
    plans.save(plans.make(str(tmp_path / "other"), [], {}))
    monkeypatch.chdir(tmp_path)
    defaults = ["--dry-run", "--input", "photos", "--output", "out", *TINY]
    assert cli.job(Embedder, "", [*defaults, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_another_driver(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    arguments = ["--dry-run", "--input", str(tmp_path / "photos"), "--output", str(tmp_path / "out"), *TINY]
    with Lock(str(tmp_path / "out")):
        assert cli.job(Embedder, "", arguments) == 4
        assert "is in use by process" in capsys.readouterr().err
    assert cli.job(Embedder, "", arguments) == 0
    assert list((tmp_path / "out").iterdir()) == []


def test_a_refused_plan_leaves_no_files_and_no_folders(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"

    def plan() -> None:
        with directory.without_leftovers(str(output)):
            (output / "_plan").mkdir(parents=True)
            (output / "_plan" / "shards-00000-x.parquet").touch()
            raise Refused("x")

    with pytest.raises(Refused):
        plan()
    assert list(tmp_path.iterdir()) == []


def test_a_retry_is_shown_after_a_second_and_once_in_ten(capsys: pytest.CaptureFixture) -> None:
    cli.speak(cli.MessageFlags())
    for waited in (0.2, 1.5, 3.0):
        cli.retry.on_retry("503", waited)
    assert capsys.readouterr().err == "nightshift: the store does not answer, trying again: 503\n"


def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = tmp_path / "job.log"
    for flags, shown in (
        ({}, ["error", "say"]),
        ({"quiet": True}, ["error"]),
        ({"verbose": True}, ["error", "say", "detail"]),
    ):
        messages.configure(messages.MessageFlags(**flags, log_file=str(log)))
        for name in ("error", "say", "detail"):
            getattr(messages, name)(name)
        assert capsys.readouterr().err.splitlines() == [f"nightshift: {name}" for name in shown]
    messages.configure(messages.MessageFlags())
    assert [line.split()[1] for line in log.read_text().splitlines()] == ["error", "say", "detail"] * 3
    with pytest.raises(SettingRefused, match="--quiet and --verbose"):
        messages.MessageFlags(quiet=True, verbose=True)
    with pytest.raises(SettingRefused, match="--log-file"):
        messages.configure(messages.MessageFlags(log_file=str(tmp_path)))


def nightshift(*arguments: str, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_overview_has_one_line_per_command() -> None:
    shown = nightshift("--help")
    assert nightshift() == shown
    for name, text in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(text)}$", shown, re.MULTILINE), name
    assert nightshift("--version") == f"nightshift {__version__}\n"


def test_unknown_words_are_refused_with_the_nearest() -> None:
    assert "did you mean embed?" in nightshift("embd", code=2)
    assert "did you mean --model?" in nightshift("embed", "--modle", "x", code=2)
    assert "did you mean --repair?" in nightshift("verify", "out", "--repar", code=2)
    assert "did you mean --stop?" in nightshift("submit", "--stpo", "x", code=2)
    assert "did you mean exact?" in nightshift("embed", "--decoder", "exac", code=2)


@pytest.mark.parametrize(
    ("line", "expected"),
    [("nightshift emb", "embed"), ("nightshift embed --mod", "--model"), ("nightshift embed --decoder e", "exact")],
)
def test_shells_complete_commands_and_flags(line: str, expected: str, tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    words = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    nightshift(**words, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert answer.read_text().strip() == expected


def test_interrupted_has_the_exit_code_of_shells() -> None:
    assert (Interrupted(2).exit_code, Interrupted(15).exit_code) == (130, 143)


@pytest.mark.parametrize(
    ("job", "more"), [(Embedder, set()), (Classifier, {"--labels", "--top-k", "--embeddings", "--head"})]
)
def test_the_flags_of_the_jobs(job: type, more: set[str], capsys: pytest.CaptureFixture) -> None:
    """A snapshot: a flag that is added or removed changes the interface."""
    with pytest.raises(SystemExit):
        cli.parse(job, "", ["--help"], messages.MessageFlags)
    words = capsys.readouterr().out.replace(",", " ").split()
    shown = {word for word in words if word.startswith("--")} - {"--help", "--config", "--no-exif-rotate"}
    assert {flag for flag in shown if not flag.startswith("--no-")} == FLAGS | NETWORK_FLAGS | more


def test_a_flag_may_be_named_like_a_word_of_python(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("from: embeddings\n")
    for arguments in (["--from", "embeddings"], ["--config", str(file)]):
        assert cli.parse(Classifier, "", arguments, VectorFlags)[2] == {"from_": "embeddings"}


def test_empty_values_in_the_file_leave_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("input: []\nkeep: []\nlimit:\noverwrite: ~\n")
    assert parsed("--config", str(file)) == ({}, {})
