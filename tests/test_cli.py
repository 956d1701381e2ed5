"""Flags, config files, exit codes."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from pipeline import cli, output
from pipeline.config import RunConfig, fingerprint
from pipeline.errors import Interrupted, NotWhole, OutputLocked, Refused, SettingRefused, TooManyErrors
from pipeline.predictors import Classifier, Embedder

FLAGS = {
    "--input", "--output", "--keep", "--image-column", "--uri-column", "--limit", "--max-pixels", "--exif-rotate",
    "--decoder", "--batch-size", "--rows-per-part", "--actors", "--gpus-per-actor", "--max-error-rate", "--overwrite",
    "--update", "--cluster", "--prices", "--dry-run",
}  # fmt: skip
NETWORK_FLAGS = {"--model", "--weights", "--precision", "--compile", "--seed", "--embedding-dtype"}


@dataclass
class Any:
    """A predictor with one flag."""

    model: str = field(default="resnet18", metadata={"help": "network"})


def parsed(*arguments: str) -> tuple[dict, dict]:
    return cli.parse(Any, "", arguments)


def test_flags_become_fields() -> None:
    run, predictor = parsed(
        "--input", "a", "b", "--output", "o", "--limit", "5", "--max-error-rate", "0.5", "--no-exif-rotate",
        "--keep", "x,y", "--keep", "z", "--model", "vgg11", "--overwrite",
    )  # fmt: skip
    config = RunConfig(**run)
    assert (config.input, config.limit, config.max_error_rate) == (("a", "b"), 5, 0.5)
    assert (config.exif_rotate, config.overwrite, config.keep) == (False, True, ("x", "y", "z"))
    assert predictor == {"model": "vgg11"}


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("input: [a]\noutput: o\nlimit: 7\nbatch-size: 16\nmodel: vgg11\n")
    run, predictor = parsed("--config", str(file), "--limit", "9")
    assert run == {"input": ["a"], "output": "o", "limit": 9, "batch_size": 16}
    assert predictor == {"model": "vgg11"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nosuch: 1", "no flag is called nosuch"),
        ("- 1", "one flag a line"),
        ("a: [", "cannot be read"),
        ("model: {a: b}", "model is .* one value"),
        ("input: [a, [b]]", "input is .* one value or a list of them"),
        ("limit: [1, 2]", "limit is .* one value"),
        ("overwrite: [true]", "overwrite is .* one value"),
        ("overwrite: maybe", "overwrite is 'maybe': it must be true or false"),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(SettingRefused, match=said):
        parsed("--config", str(file))
    with pytest.raises(SettingRefused, match="cannot be read"):
        parsed("--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("text", ["limit: ten", "max_error_rate: 5%", "batch_size: 16.5"])
def test_a_value_in_the_file_is_checked_as_a_flag_is(tmp_path: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parsed("--config", str(file))
    assert ended.value.code == 2
    assert f"--{text.partition(':')[0].replace('_', '-')}: invalid" in capsys.readouterr().err


def test_values_in_the_file_are_what_was_written(tmp_path: Path) -> None:
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
    ("values", "said"),
    [
        ({"input": ()}, "--input is missing"),
        ({"output": ""}, "--output is missing"),
        ({"limit": 0}, "--limit is 0: it must be at least 1"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"max_error_rate": 2.0}, "--max-error-rate is 2.0: it is a share between 0 and 1"),
        ({"actors": "4:2"}, "--actors is '4:2'"),
        ({"actors": "many"}, "--actors is 'many'"),
        ({"gpus_per_actor": "1.5"}, "--gpus-per-actor is '1.5'"),
        ({"gpus_per_actor": "inf"}, "--gpus-per-actor is 'inf'"),
        ({"gpus_per_actor": "nan"}, "--gpus-per-actor is 'nan'"),
    ],
)
def test_bad_settings_are_refused_with_value_and_remedy(values: dict, said: str) -> None:
    with pytest.raises(SettingRefused, match=said):
        RunConfig(**{"input": ("a",), "output": "o", **values})


@pytest.mark.parametrize("keep", ["label", "text:width", "a:x,b:x", "text:gpu_seconds"])
def test_a_kept_column_may_not_bear_a_name_that_is_taken(keep: str) -> None:
    classifier = SimpleNamespace(columns=pa.schema([("label", pa.string())]))
    with pytest.raises(SettingRefused, match=r"--keep \w+: a column '\w+' is there already; give it another name"):
        output._check_keep(RunConfig(input="a", output="o", keep=keep), classifier)  # type: ignore[arg-type]
    output._check_keep(RunConfig(input="a", output="o", keep="label:truth,text"), classifier)  # type: ignore[arg-type]


def test_actors_and_gpus() -> None:
    config = RunConfig(input="a", output="o", actors="2:6", gpus_per_actor="0.5")
    assert (config.actor_range(), config.gpu_share()) == ((2, 6), 0.5)
    assert RunConfig(input="a", output="o").actor_range() is None


def test_the_fingerprint_changes_with_what_changes_results() -> None:
    base = RunConfig(input="a", output="o").result_settings()
    for values in ({"limit": 3}, {"keep": "x"}, {"exif_rotate": False}, {"max_pixels": 9}):
        assert fingerprint(RunConfig(input="a", output="o", **values).result_settings()) != fingerprint(base)
    for values in ({"batch_size": 3}, {"actors": "2"}, {"max_error_rate": 0.5}, {"output": "p"}):
        assert fingerprint(RunConfig(**{"input": "a", "output": "o", **values}).result_settings()) == fingerprint(base)


@pytest.mark.parametrize(
    ("error", "code"),
    [(Refused("x"), 2), (TooManyErrors("x"), 3), (OutputLocked("x"), 4), (NotWhole("x"), 5)],
)
def test_errors_made_on_purpose_end_as_a_sentence(error: Exception, code: int, capsys: pytest.CaptureFixture) -> None:
    def work() -> int:
        raise error

    assert cli.guarded(work) == code
    assert capsys.readouterr().err == "nightshift: x\n"


def test_interrupted_has_the_shells_exit_code() -> None:
    assert (Interrupted(2).exit_code, Interrupted(15).exit_code) == (130, 143)


@pytest.mark.parametrize(("job", "own"), [(Embedder, set()), (Classifier, {"--labels", "--top-k", "--embeddings"})])
def test_the_jobs_flags(job: type, own: set[str], capsys: pytest.CaptureFixture) -> None:
    """A snapshot: a flag that comes or goes is a change of the product's face."""
    with pytest.raises(SystemExit):
        cli.parse(job, "", ["--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    shown = {word for word in words if word.startswith("--")} - {"--help", "--config", "--no-exif-rotate"}
    assert {flag for flag in shown if not flag.startswith("--no-")} == FLAGS | NETWORK_FLAGS | own


def test_empty_values_in_the_file_leave_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("input: []\nkeep: []\nlimit:\noverwrite: ~\n")
    assert parsed("--config", str(file)) == ({}, {})
