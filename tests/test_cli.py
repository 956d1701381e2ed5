"""Flags, config files, exit codes."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config import RunConfig
from pipeline.errors import Interrupted, NotWhole, OutputLocked, Refused, SettingRefused, TooManyErrors
from pipeline.output.run_record import fingerprint
from pipeline.predictors.classify import Classifier
from pipeline.predictors.embed import Embedder

FLAGS = {
    "--input", "--output", "--keep", "--image-column", "--uri-column", "--limit", "--max-pixels", "--exif-rotate",
    "--decoder", "--batch-size", "--rows-per-part", "--actors", "--gpus-per-actor", "--max-error-rate", "--overwrite",
    "--update", "--cluster", "--prices", "--dry-run",
}  # fmt: skip
NETWORK_FLAGS = {"--model", "--weights", "--precision", "--compile", "--seed", "--embedding-dtype"}


@dataclass
class OneFlag:
    """A predictor with one flag."""

    model: str = field(default="resnet18", metadata={"help": "network"})


def parsed(*arguments: str) -> tuple[dict, dict]:
    return cli.parse(OneFlag, "", arguments)


def test_flags_become_fields() -> None:
    run, predictor = parsed(
        "--input", "a", "b", "--output", "o", "--limit", "5", "--max-error-rate", "0.5", "--no-exif-rotate",
        "--keep", "x,y", "--keep", "z", "--model", "vgg11", "--overwrite",
    )  # fmt: skip
    config = RunConfig(**run)
    assert (config.input, config.limit, config.max_error_rate) == (("a", "b"), 5, 0.5)
    assert (config.exif_rotate, config.overwrite, config.keep) == (False, True, ("x", "y", "z"))
    assert predictor == {"model": "vgg11"}


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
    ],
)
def test_bad_settings_are_refused_with_value_and_remedy(values: dict, message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        RunConfig(**{"input": ("a",), "output": "o", **values})


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


def test_interrupted_has_the_exit_code_of_shells() -> None:
    assert (Interrupted(2).exit_code, Interrupted(15).exit_code) == (130, 143)


@pytest.mark.parametrize(("job", "more"), [(Embedder, set()), (Classifier, {"--labels", "--top-k", "--embeddings"})])
def test_the_flags_of_the_jobs(job: type, more: set[str], capsys: pytest.CaptureFixture) -> None:
    """A snapshot: a flag that is added or removed changes the interface."""
    with pytest.raises(SystemExit):
        cli.parse(job, "", ["--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    shown = {word for word in words if word.startswith("--")} - {"--help", "--config", "--no-exif-rotate"}
    assert {flag for flag in shown if not flag.startswith("--no-")} == FLAGS | NETWORK_FLAGS | more


def test_empty_values_in_the_file_leave_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("input: []\nkeep: []\nlimit:\noverwrite: ~\n")
    assert parsed("--config", str(file)) == ({}, {})
